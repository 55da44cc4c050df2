"""The carriers of an intervention: hooks, an edit in memory."""
