"""JSON schemas: as people write them, to as the grammar library takes them; in a structure's process."""
