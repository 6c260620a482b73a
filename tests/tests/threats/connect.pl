# TO PORT [MARK [FROM]]: one connection with this mark and from this address, a request, and what comes back.
# Says on standard error how far it came.
use strict;
use Socket qw(:all);

my ($to, $port, $mark, $from) = @ARGV;
my $six = $to =~ /:/;
sub address {
    my ($ip, $number) = @_;
    return $six ? pack_sockaddr_in6($number, inet_pton(AF_INET6, $ip)) : pack_sockaddr_in($number, inet_aton($ip));
}
socket(my $socket, $six ? AF_INET6 : AF_INET, SOCK_STREAM, 0) or die "socket: $!\n";
# SO_MARK
if ($mark) { setsockopt($socket, SOL_SOCKET, 36, pack("i", oct($mark))) or die "mark: $!\n"; }
if ($from) { bind($socket, address($from, 0)) or die "bind: $!\n"; }
$SIG{ALRM} = sub { die "time is over\n" };
alarm 4;
connect($socket, address($to, $port)) or die "connect: $!\n";
print STDERR "connected\n";
syswrite($socket, "GET / HTTP/1.0\r\n\r\n") or die "write: $!\n";
while (1) {
    my $read = sysread($socket, my $bytes, 4096);
    die "read: $!\n" unless defined $read;
    last unless $read;
    print $bytes;
}
