"""The command line `zoray` and the folder a run leaves behind."""
