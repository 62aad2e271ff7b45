# bash completion for pysplice and pasta; made by contrib/make-docs
_pysplice()
{
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    if [[ $cur == '=' ]]; then cur=; elif [[ $prev == '=' ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
    if [[ ${COMP_WORDS[1]} == ctl && $COMP_CWORD == 2 ]]; then
        compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return
    elif [[ ${COMP_WORDS[1]} == ctl && $COMP_CWORD == 3 ]]; then
        COMPREPLY=($(compgen -W "show add del" -- "$cur")); return
    elif [[ ${COMP_WORDS[1]} == ctl && $COMP_CWORD -gt 3 && $cur == -* ]]; then
        COMPREPLY=($(compgen -W "--json -t --tcp-ports -u --udp-ports -T --tcp-ns -U --udp-ns" -- "$cur")); return
    fi
    case $prev in
    -P|--pid|-c|--conf-path|--control|-l|--log-file|-p|--pcap|--netns|--userns|--trace-window) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
    -t|--tcp-ports) COMPREPLY=($(compgen -W "none auto all" -- "$cur")); return ;;
    -u|--udp-ports) COMPREPLY=($(compgen -W "none auto all" -- "$cur")); return ;;
    -T|--tcp-ns) COMPREPLY=($(compgen -W "none auto all" -- "$cur")); return ;;
    -U|--udp-ns) COMPREPLY=($(compgen -W "none auto all" -- "$cur")); return ;;
    --map-host-loopback) COMPREPLY=($(compgen -W "none" -- "$cur")); return ;;
    --map-guest-addr) COMPREPLY=($(compgen -W "none" -- "$cur")); return ;;
    --udp-filter) COMPREPLY=($(compgen -W "endpoint address port" -- "$cur")); return ;;
    -D|--dns) COMPREPLY=($(compgen -W "none" -- "$cur")); return ;;
    --window) COMPREPLY=($(compgen -W "sndbuf linear segments segments-wmem peer truesize" -- "$cur")); return ;;
    --limit-output) COMPREPLY=($(compgen -W "auto off" -- "$cur")); return ;;
    --runas|--log-size|--stats|--tap|-I|--ns-ifname|-F|--fd|--busy-poll|-a|--address|-n|--netmask|-g|--gateway|-i|--interface|-m|--mtu|-M|--mac-addr|--ns-mac-addr|-o|--outbound|--outbound-if4|--outbound-if6|--limit-flows|-S|--search|--dns-forward|--dns-host|-H|--hostname|--fqdn) return ;;
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "-f --foreground -P --pid -c --conf-path --control --runas -h --help --version -d --debug --trace -q --quiet -l --log-file --log-size --log-time --stats -p --pcap --tap -I --ns-ifname -F --fd --netns --userns --netns-only --no-netns-quit --no-pidns --new-session --no-offload --busy-poll --config-net -a --address -n --netmask -g --gateway -i --interface -m --mtu -M --mac-addr --ns-mac-addr --no-copy-addrs --no-copy-routes --follow-host -4 --ipv4-only -6 --ipv6-only -t --tcp-ports -u --udp-ports -T --tcp-ns -U --udp-ns --freebind --no-splice --host-lo-to-ns-lo --splice-only --no-map-gw --map-host-loopback --map-guest-addr -o --outbound --outbound-if4 --outbound-if6 --udp-filter --limit-flows -D --dns -S --search --dhcp-dns --dhcp-search --dns-forward --dns-host --resolv-conf -H --hostname --fqdn --no-tcp --no-udp --no-icmp --no-dhcp --no-dhcpv6 --no-ndp --no-ra --window --limit-output --trace-window" -- "$cur"))
    else
        COMPREPLY=($(compgen -c -- "$cur"))
    fi
}
complete -F _pysplice pysplice pasta
