"""`kunserve plan`: before GPUs are bought or a server is started."""
