"""For people who build and run pfvol; nothing of it is installed."""
