"""The tap device: made or attached by name, or taken as a descriptor.

Owns nothing once it has returned the descriptor.  Imports `config`.  TUNSETIFF is pytun-pmd3's; the ioctls that
it lacks are here (linux/if_tun.h).
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from typing import NamedTuple

from pytun_pmd3 import TunTapDevice
from pytun_pmd3.linux import IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR

from ..config import ConfigError

DEVICE = "/dev/net/tun"

TUNGETIFF = 0x800454D2
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNATTACHFILTER = 0x401054D5
TUNDETACHFILTER = 0x401054D6
BPF_RET_K = 0x06

# TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN; TUN_F_USO4, TUN_F_USO6 (Linux 6.2)
OFFLOADS = 0x01 | 0x02 | 0x04 | 0x08
OFFLOADS_UDP = 0x20 | 0x40
VNET_HEADER_BYTES = 10

IFREQ = "16sH22x"


class _Tap(TunTapDevice):  # type: ignore[misc]
    """A tap without a finalizer: the original closes a second time what a failed TUNSETIFF has already closed."""

    def __del__(self) -> None:
        pass


class Device(NamedTuple):
    """An open tap.  `vnet`: its frames carry a virtio header; `uso`: it segments UDP."""

    fd: int
    name: str
    vnet: bool
    uso: bool


def open_tap(name: str, offload: bool) -> Device:
    """The tap `name` in the namespace of this process, made if it is not there; raises ConfigError."""
    flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if offload else 0)
    try:
        try:
            tap = _Tap(name, flags, DEVICE)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            # A tap that was made with several queues has to be attached as such
            tap = _Tap(name, flags | IFF_MULTI_QUEUE, DEVICE)
    except FileNotFoundError:
        raise ConfigError(f"there is no {DEVICE}: load the tun module, or pass the device in") from None
    except OSError as e:
        raise ConfigError(_reason(name, e)) from None
    fd = os.dup(tap.fileno())
    tap.close()
    uso = False
    if offload:
        uso = _set_offloads(fd, True)
    else:
        # A persistent tap keeps the offloads of the program that had it before
        fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    return Device(fd, name, offload, uso)


def _reason(name: str, e: OSError) -> str:
    if e.errno == errno.EBUSY:
        return f"the tap {name} is in use by another process"
    if e.errno == errno.EINVAL:
        return f"cannot open the tap {name}: another kind of interface has that name"
    if e.errno in (errno.EACCES, errno.EPERM):
        return f"cannot open the tap {name}: no permission ({DEVICE} should have mode 0666)"
    return f"cannot open the tap {name}: {e.strerror}"


def tap_from_fd(fd: int, offload: bool) -> Device:
    """A tap that the caller has opened; raises ConfigError if the descriptor is not a tap."""
    try:
        data = fcntl.ioctl(fd, TUNGETIFF, bytes(struct.calcsize(IFREQ)))
    except OSError as e:
        raise ConfigError(f"descriptor {fd} is not a tap: {e.strerror}") from None
    name, flags = struct.unpack(IFREQ, data)
    if not flags & IFF_TAP or not _without_packet_information(fd):
        raise ConfigError(f"descriptor {fd} must be a tap with IFF_NO_PI")
    vnet = bool(flags & IFF_VNET_HDR)
    uso = _set_offloads(fd, offload) if vnet else False
    return Device(fd, name.split(b"\0")[0].decode(errors="replace"), vnet, uso)


def _without_packet_information(fd: int) -> bool:
    """True if the tap has IFF_NO_PI.

    TUNGETIFF uses the same bit for IFF_NOFILTER, which is set while no filter is attached.  So we attach a filter that
    lets everything pass, for a moment.
    """
    accept = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RET_K, 0, 0, 0xFFFFFFFF))
    program = struct.pack("HxxxxxxP", 1, ctypes.addressof(accept))
    fcntl.ioctl(fd, TUNATTACHFILTER, program)
    try:
        _, flags = struct.unpack(IFREQ, fcntl.ioctl(fd, TUNGETIFF, bytes(struct.calcsize(IFREQ))))
    finally:
        fcntl.ioctl(fd, TUNDETACHFILTER, program)
    return bool(flags & IFF_NO_PI)


def _set_offloads(fd: int, on: bool) -> bool:
    """Set the length of the virtio header, and the offloads; True if the guest may leave UDP segmentation to us."""
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
    if not on:
        fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
        return False
    # On an old kernel without these offloads the header alone saves nothing, and costs nothing
    for offloads in (OFFLOADS | OFFLOADS_UDP, OFFLOADS):
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, TUNSETOFFLOAD, offloads)
            return bool(offloads & OFFLOADS_UDP)
    return False
