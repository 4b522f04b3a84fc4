"""How fast a folder answers on this machine, and which settings make it faster."""
