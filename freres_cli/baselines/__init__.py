"""The methods that Fre-Res is compared with, one small file each, all listed in ``registry.py``."""
