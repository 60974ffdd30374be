"""Which of this machine's network interfaces leads to the other hosts."""

import fcntl
import socket
import struct

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
_NAME_BYTES = 15
_ANY_PORT = 9


def interface_towards(host: str) -> str | None:
    """Name of the interface through which this machine reaches ``host``, by IPv4; None if that cannot be found out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, _ANY_PORT))  # of a datagram socket: chooses the way, sends nothing
        except OSError:
            return None
        own_address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:_NAME_BYTES])
            try:
                answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(answer[20:24]) == own_address:
                return name
    return None
