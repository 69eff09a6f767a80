"""Other libraries' files: a file for each format, no network. `sae.formats.registry` finds the one for a folder."""
