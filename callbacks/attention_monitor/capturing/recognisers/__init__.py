"""The ways of calling attention that are read, one in each module; every module of this folder is loaded."""
