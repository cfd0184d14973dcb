"The steps of `tools/build_site.py`: chapters -> numbered pages -> finished HTML -> checks."
