"""The tiers as processes: `enrolment` writes a directory for each, `settings` reads it, `processes` run it, `together` starts all at once.

    cloud process    session + RemoteEdges   --TLS, enrolled keys-->   edge process    EdgeHost   --the same-->   device process    Host

A device's part of this imports nothing of PyTorch.
"""
