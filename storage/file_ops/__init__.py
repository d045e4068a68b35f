"""Changes to files that a build asks for: copies between trees, new files and directories, digests of selections."""
