"""A serving application: tells each client in one JSON line whom it sees, by accept() and by getpeername().

Usage: server.py [HOW:PORT ...], where HOW is v4, dual, v6only, mptcp, udp, or hold (which keeps connections open)
"""

import json
import socket
import sys
import threading

IPPROTO_MPTCP = 262


def show(name):
    return [name[0], name[1]]


def serve(listener, hold):
    held = []
    while True:
        sock, accepted = listener.accept()
        try:
            view = {"accept": show(accepted), "peer": show(sock.getpeername()), "local": show(sock.getsockname())}
            view["congestion"] = sock.getsockopt(socket.IPPROTO_TCP, 13, 16).rstrip(b"\0").decode()
            sock.sendall(json.dumps(view).encode() + b"\n")
            if hold:
                held.append(sock)
            else:
                # Plain close after the client's, so that no unread data turns it into a reset.
                sock.settimeout(1)
                while sock.recv(4096):
                    pass
                sock.close()
        except OSError:
            pass


def serve_udp(sock):
    while True:
        _, peer = sock.recvfrom(4096)
        sock.sendto(json.dumps({"peer": show(peer)}).encode() + b"\n", peer)


threads = []
for argument in sys.argv[1:]:
    how, port = argument.split(":")
    family = socket.AF_INET if how in ("v4", "udp", "hold") else socket.AF_INET6
    kind = socket.SOCK_DGRAM if how == "udp" else socket.SOCK_STREAM
    sock = socket.socket(family, kind, IPPROTO_MPTCP if how == "mptcp" else 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(how == "v6only"))
    sock.bind(("", int(port)))
    if how == "udp":
        threads.append(threading.Thread(target=serve_udp, args=(sock,), daemon=True))
    else:
        sock.listen(128)
        threads.append(threading.Thread(target=serve, args=(sock, how == "hold"), daemon=True))
for thread in threads:
    thread.start()
print("ready", flush=True)
for thread in threads:
    thread.join()
