"""`resilin watch`: a page that shows a run's cluster, curves and changes, from its events and its launcher."""
