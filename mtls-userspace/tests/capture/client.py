"""An application's client: dials in one of many ways, reads one line, says in JSON what it saw.

Usage: client.py HOW ADDRESS PORT [DETAIL]
"""

import ctypes
import errno
import json
import mmap
import os
import select
import socket
import struct
import sys
import time

IPPROTO_MPTCP = 262
how, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
detail = sys.argv[4] if len(sys.argv) > 4 else ""
family = socket.AF_INET6 if ":" in address else socket.AF_INET
deadline = 8


def io_uring_connect(sock, target):
    """One IORING_OP_CONNECT, by hand."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)
    ring = libc.syscall(425, 4, params)
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    words = struct.unpack("<30I", params.raw)
    sq_tail, sq_array, cq_head, cq_cqes = words[11], words[16], words[20], words[25]
    sq = mmap.mmap(ring, 4096, offset=0)
    cq = sq if words[5] & 1 else mmap.mmap(ring, 4096, offset=0x8000000)
    sqes = mmap.mmap(ring, 4096, offset=0x10000000)
    packed = struct.pack("<H", family) + struct.pack(">H", target[1])
    if family == socket.AF_INET:
        packed += socket.inet_pton(family, target[0]) + bytes(8)
    else:
        packed += bytes(4) + socket.inet_pton(family, target[0]) + bytes(4)
    name = ctypes.create_string_buffer(packed, len(packed))
    sqes[0:24] = struct.pack("<BBHiQ", 16, 0, 0, sock.fileno(), len(packed)) + struct.pack("<Q", ctypes.addressof(name))
    sq[sq_array:sq_array + 4] = struct.pack("<I", 0)
    sq[sq_tail:sq_tail + 4] = struct.pack("<I", 1)
    if libc.syscall(426, ring, 1, 1, 1, None, 0) < 0:
        raise OSError(ctypes.get_errno(), "io_uring_enter")
    result = struct.unpack("<i", cq[cq_cqes + 8:cq_cqes + 12])[0]
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def dial():
    target = (address, port)
    protocol = IPPROTO_MPTCP if how == "mptcp" else 0
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    sock.settimeout(deadline)
    if how == "bound":
        sock.bind((detail, 0))
    elif how == "bound-exactly":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        host, _, own = detail.rpartition(":")
        sock.bind((host, int(own)))
    elif how == "v6only":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    elif how == "bound-port":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((detail, 45454))
    elif how == "device":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, detail.encode())
    elif how == "mark":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, int(detail))
    if how == "nonblocking":
        sock.setblocking(False)
        code = sock.connect_ex(target)
        if code != errno.EINPROGRESS:
            raise OSError(code, os.strerror(code))
        select.select([], [sock], [], deadline)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        sock.settimeout(deadline)
    elif how == "fastopen":
        sock.setblocking(True)
        sock.sendto(b"early\n", 0x20000000, target)
        sock.settimeout(deadline)
    elif how == "fastopen-connect":
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, 30, 1)
        sock.connect(target)
        sock.sendall(b"early\n")
        sock.settimeout(deadline)
    elif how == "io_uring":
        sock.setblocking(True)
        io_uring_connect(sock, target)
        sock.settimeout(deadline)
    elif how == "reconnect":
        sock.connect(target)
        sock.recv(4096)
        # Disconnects; the socket then dials something of its own.
        ctypes.CDLL(None).connect(sock.fileno(), struct.pack("<H14x", socket.AF_UNSPEC), 16)
        listener = socket.create_server(("127.0.0.1", 0))
        sock.connect(listener.getsockname())
        listener.accept()[0].sendall(b"null\n")
    else:
        sock.connect(target)
    return sock


def udp():
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(deadline)
    sock.connect((address, port))
    sock.send(b"hello")
    return sock


def congestion(sock):
    if sock.type != socket.SOCK_STREAM:
        return ""
    return sock.getsockopt(socket.IPPROTO_TCP, 13, 16).rstrip(b"\0").decode()


def many(count):
    """Opens and closes that many connections, one after the other, and is always the one that closes first."""
    for _ in range(count):
        with socket.create_connection((address, port), timeout=deadline) as sock:
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass


def show(name):
    return [name[0], name[1]]


start = time.monotonic()
try:
    if how == "many":
        many(int(detail))
    sock = udp() if how == "udp" else dial()
    line = b""
    while not line.endswith(b"\n"):
        chunk = sock.recv(4096)
        if not chunk:
            break
        line += chunk
    seen = {"local": show(sock.getsockname()), "peer": show(sock.getpeername()), "congestion": congestion(sock), "reply": json.loads(line or "null")}
    if how == "hold":
        print(json.dumps(seen), flush=True)
        try:
            rest = sock.recv(1)
            seen = {"end": "clean" if rest == b"" else "data"}
        except socket.timeout:
            seen = {"end": "open"}
        except OSError as error:
            seen = {"end": errno.errorcode[error.errno]}
except OSError as error:
    seen = {"error": errno.errorcode.get(error.errno, str(error))}
seen["seconds"] = time.monotonic() - start
print(json.dumps(seen), flush=True)
