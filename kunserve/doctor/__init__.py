"""`kunserve doctor`: what a server needs of this machine, what is missing, and what will therefore fail or be slow."""
