"""Recipes out of other people's configuration files."""
