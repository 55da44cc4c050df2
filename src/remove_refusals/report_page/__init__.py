"""The report of a run as one HTML page, from the records in its directory; nothing is computed but what is printed."""
