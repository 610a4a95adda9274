"""The page of ``freres report``: plain facts -> one HTML file that needs no script, no network and no other file."""
