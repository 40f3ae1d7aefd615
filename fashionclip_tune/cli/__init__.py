"""The commands of ``python -m fashionclip_tune``, one file each."""
