"""UniFork: training unified image understanding and generation models, from images to scores."""

import os

__version__ = "0.1.0"

# Must be set before torch is loaded. By default OpenMP threads spin while they wait for each other;
# with any other load on the machine a step of the small models took 60 times longer (measured,
# two threads on two busy cores: 5.2 s instead of 0.09 s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
