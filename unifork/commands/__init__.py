"""Groups of commands of `unifork`, one file a group; heavy imports stand inside the functions."""
