# CLAIMED ADDRESS: a DNS server at CLAIMED that says of every name that it is at ADDRESS, by IPv4. Says "bound" once it is there,
# and ends after a minute.
use strict;
use Socket qw(:all);

my ($claimed, $address) = @ARGV;
$| = 1;
alarm 60;
socket(my $socket, AF_INET, SOCK_DGRAM, 0) or die "socket: $!\n";
bind($socket, pack_sockaddr_in(53, inet_aton($claimed))) or die "bind: $!\n";
print "bound\n";
while (defined(my $from = recv($socket, my $query, 4096, 0))) {
    # The question ends four bytes after the root label; what follows it (EDNS) is not repeated.
    my $end = 12;
    while (my $label = ord(substr($query, $end, 1))) { $end += $label + 1; }
    my $question = substr($query, 12, $end + 5 - 12);
    my $is_a = unpack("n", substr($question, -4, 2)) == 1;
    my $answer = $is_a ? pack("nnnNn", 0xc00c, 1, 1, 60, 4) . inet_aton($address) : "";
    send($socket, substr($query, 0, 2) . pack("nnnnn", 0x8580, 1, $is_a, 0, 0) . $question . $answer, 0, $from);
}
