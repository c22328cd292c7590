"""The guest's side, for tests, demos and benchmarks: shipped, since embedders need it as well.

`Driver` speaks to a device through rings in `GuestRam`, `MmioDriver` through a register window too,
`PciDevice` is a device that a driver finds on a PCI bus; `GuardedRam` is memory between guard pages;
`balloon.testing.faults` stands in for the kernel; `balloon.testing.uml` boots a real Linux guest;
`balloon.testing.frontend` is a vhost-user front-end.
"""

from balloon.testing.driver import Buffer, DeviceError, Driver, DriverQueue
from balloon.testing.mmio import MmioDevice, MmioDriver
from balloon.testing.pci import PciDevice
from balloon.testing.ram import GuardedRam, GuestRam

__all__ = [
    "Buffer",
    "DeviceError",
    "Driver",
    "DriverQueue",
    "GuardedRam",
    "GuestRam",
    "MmioDevice",
    "MmioDriver",
    "PciDevice",
]
