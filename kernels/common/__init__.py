"""What the Triton backends of all rooms share. Importing this needs no triton, its modules do."""
