"""A virtio-pci function, for a VMM that embeds the device: `VirtioPci`.

`space` has what any function has, `interrupts` who is told of what, `common` the structure by which a device
is set up, and `function` puts them where the driver finds them.
"""

from balloon.pci.function import VirtioPci

__all__ = ["VirtioPci"]
