"""Tables and figures, drawn from the results of runs."""
