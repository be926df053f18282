"""The native ops' sources. Imported and installed as `hdp.csrc` (`hdp/csrc` is a link), so that an
installed package can build its library too: `hdp doctor --build`."""
