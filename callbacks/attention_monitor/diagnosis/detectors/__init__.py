"""The signs of trouble that are looked for, one in each module; every module of this folder is loaded."""
