"""Discrete events: when work happens where speed depends on who else is at work.

`flows` shares links and cores among tasks in streams; `network` makes the links and routes of a cluster.
"""
