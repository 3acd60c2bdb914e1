"""Reports: pages for people, made from the files of results alone."""
