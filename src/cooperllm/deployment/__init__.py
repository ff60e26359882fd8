"""The tiers as processes: `enrolment` writes a directory for each, `settings` reads it, one file a tier runs it, `together` starts all.

    cloud process    session + RemoteEdges   --TLS, enrolled keys-->   edge process    EdgeHost   --the same-->   device process    Host

A device's part of this imports nothing of PyTorch.
"""
