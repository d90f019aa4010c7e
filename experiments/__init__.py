"""Known phenomena of attention, reproduced in minutes and watched with this package."""
