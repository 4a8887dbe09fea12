"""The rooms: one package an op, each a link to the folder of the same name in the repository's kernels/."""
