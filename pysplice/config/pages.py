"""What the manual says of the other commands: `pesto`, `pysplice ctl`, `pysplice-cni`, `pysplice-netavark`.

Pure.  Imports nothing of the project.
"""

from typing import NamedTuple


class Switch(NamedTuple):
    """An option, as it is described; `metavar` stands for its value (empty: it takes none)."""

    names: tuple[str, ...]
    metavar: str
    help: str


class Page(NamedTuple):
    """A command, and the page of the manual that has it.

    `synopsis`: what follows the name, a form each; `sections`: a heading, and either terms with what they mean, or a
    text that is kept as it is.
    """

    name: str
    page: str
    section: int
    purpose: str
    synopsis: tuple[str, ...]
    about: str
    switches: tuple[Switch, ...]
    sections: tuple[tuple[str, tuple[tuple[str, str], ...] | str], ...]
    see_also: str


PORTS_NOTE = "as for pasta, for instance 8080, 8080:80, 192.0.2.1/8080-8090, all, auto or none"

_PORTS = (
    Switch(("-t", "--tcp-ports"), "PORTS", "TCP ports of the host that lead to the guest"),
    Switch(("-u", "--udp-ports"), "PORTS", "UDP ports of the host that lead to the guest"),
    Switch(
        ("-T", "--tcp-ns"), "PORTS", "TCP ports of the guest's loopback interface that lead to the host's"
    ),
    Switch(
        ("-U", "--udp-ns"), "PORTS", "UDP ports of the guest's loopback interface that lead to the host's"
    ),
)

PESTO = Page(
    name="pesto",
    page="pysplice-pesto",
    section=1,
    purpose="show or change the forwarded ports of a running pasta or pysplice",
    synopsis=("[OPTION]... PATH",),
    about="Show or change the forwarded ports of a pasta or pysplice that was started with -c PATH.",
    switches=(
        Switch(("-A", "--add"), "", "Add the ports that follow, instead of replacing the table"),
        Switch(("-D", "--delete"), "", "Delete the ports that follow"),
        Switch(("-C", "--clear"), "PIF", "Clear the table PIF: HOST or SPLICE"),
        *_PORTS,
        Switch(("-s", "--show"), "", "Show the tables before and after the change"),
        Switch(("-d", "--debug"), "", "Say what is received"),
        Switch(("-h", "--help"), "", "Show this help and exit"),
        Switch(("--version",), "", "Show the version and exit"),
    ),
    sections=(
        (
            "NOTES",
            (
                ("PORTS", f"Written {PORTS_NOTE}."),
                (
                    "Without -A and -D",
                    "Ports replace their whole table: with -t alone the host's UDP ports go.",
                ),
                ("Name", "pysplice is a pesto where it is called by this name: make a link."),
            ),
        ),
        (
            "EXIT STATUS",
            (
                ("0", "The tables were shown, or the change was made."),
                ("1", "The command line is wrong, there is no server, or it refuses; a line says which."),
            ),
        ),
        (
            "EXAMPLES",
            "pesto -s /run/user/1000/pesto.sock\npesto -A -t 8080:80 /run/user/1000/pesto.sock",
        ),
    ),
    see_also="pysplice(1), pysplice-ctl(1), pasta(1)",
)

CTL = Page(
    name="pysplice ctl",
    page="pysplice-ctl",
    section=1,
    purpose="show or change what a running pysplice does",
    synopsis=("PATH show [--json]", "PATH add [-t|-u|-T|-U PORTS]...", "PATH del [-t|-u|-T|-U PORTS]..."),
    about=(
        "Show or change the forwarded ports of a pysplice that was started with --control PATH.  The changes of one "
        "command are made together or not at all.  Where pesto speaks pasta's protocol, this one also has sockets "
        "with a path, a part of a range, and what went wrong."
    ),
    switches=_PORTS,
    sections=(
        (
            "REQUESTS",
            (
                (
                    "show",
                    "List rules, listeners, connections, updates by pesto that were refused, and counts.  With --json "
                    "as one object: rules, listening, connections and refused are lists of lines, counts is a line, "
                    "figures has the counts as numbers.",
                ),
                ("add", "Add these ports."),
                ("del", "Delete these ports; a part of a range, too."),
            ),
        ),
        (
            "EXIT STATUS",
            (
                ("0", "It was done."),
                ("1", "The request is wrong, there is no server, or it refuses; a line says which."),
            ),
        ),
        (
            "EXAMPLES",
            "pysplice ctl /run/user/1000/box.sock show\npysplice ctl /run/user/1000/box.sock add -t 8080:80 -u 5353:53",
        ),
    ),
    see_also="pysplice(1), pysplice-pesto(1)",
)  # fmt: skip

CNI = Page(
    name="pysplice-cni",
    page="pysplice-cni",
    section=8,
    purpose="a plugin that gives containers a network (CNI)",
    synopsis=("",),
    about=(
        "Called by an engine such as containerd for each container, by way of a link in the engine's folder of "
        "plugins: the environment has the request, stdin the network's configuration as JSON, stdout takes the "
        "result.  ADD starts a pysplice for the container's namespace, in the background; DEL ends it."
    ),
    switches=(),
    sections=(
        (
            "ENVIRONMENT",
            (
                ("CNI_COMMAND", "ADD, DEL, CHECK, GC, STATUS or VERSION."),
                ("CNI_CONTAINERID, CNI_IFNAME", "Which container, and the name of its interface."),
                ("CNI_NETNS", "The path of its network namespace."),
                ("CNI_ARGS, CNI_PATH", "As the specification has them; not used."),
                ("PYSPLICE_CNI_STATE", "The folder for state files, instead of the one below."),
            ),
        ),
        (
            "CONFIGURATION",
            (
                ("cniVersion", "0.1.0 to 1.1.0."),
                ("mtu", "Of the interface; default: 65520."),
                ("dns", "nameservers and search for the container; default: 169.254.1.1, the host's name server."),
                ("options", "Options of pysplice, a list of words."),
                ("runas", "The user that pysplice changes to when the engine runs as root; default: nobody."),
                ("capabilities", "portMappings, ips and dns."),
            ),
        ),
        (
            "FILES",
            (
                ("/run/pysplice-cni", "State files of root; those of a user are below $XDG_RUNTIME_DIR."),
                ("/etc/cni/net.d/10-pysplice.conflist", "Where an engine looks for the configuration of a network."),
            ),
        ),
        ("EXIT STATUS", (("0", "It was done."), ("1", "It was not: stdout has an error, as the specification says."))),
    ),
    see_also="pysplice(1)",
)  # fmt: skip

NETAVARK = Page(
    name="pysplice-netavark",
    page="pysplice-netavark",
    section=8,
    purpose="a plugin that gives podman's containers a network (netavark)",
    synopsis=("info", "create", "setup PATH", "teardown PATH"),
    about=(
        "Called by netavark for networks whose driver is the name of a link to this program, in a folder that "
        "netavark_plugin_dirs of containers.conf(5) names.  stdin has the network or the request, stdout takes the "
        "answer, as JSON.  setup starts a pysplice for the container's namespace, in the background; teardown ends it."
    ),
    switches=(),
    sections=(
        (
            "OPTIONS OF A NETWORK",
            (
                ("mtu", "Of the interface; default: 65520."),
                ("options", "Options of pysplice, separated by spaces."),
                ("runas", "The user that pysplice changes to for containers of root; default: nobody."),
            ),
        ),
        (
            "ENVIRONMENT",
            (("PYSPLICE_CNI_STATE", "The folder for state files, instead of the one of pysplice-cni(8)."),),
        ),
        ("EXIT STATUS", (("0", "It was done."), ("1", "It was not: stdout has an object with the error."))),
        (
            "EXAMPLES",
            "podman network create --driver pysplice -o mtu=1500 box\n"
            "podman run --network box -p 8080:80 IMAGE",
        ),
    ),
    see_also="pysplice(1), pysplice-cni(8), podman-network-create(1)",
)  # fmt: skip
