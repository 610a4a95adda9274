"""The command line: verbs, options and the only printer."""
