"""The commands, one file each; what they do lives in the packages below."""
