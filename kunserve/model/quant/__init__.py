"""How the matrices of a model are stored: as numbers, or in blocks of codes with their scales."""
