"""The command line's commands; cli.py puts them together."""
