use super::*;
use crate::telemetry::{LogFormat, logging::capture};

fn connection(pod: &str) -> Connection {
    Connection {
        direction: Direction::Outbound,
        source_addr: "10.0.0.1:1000".parse().unwrap(),
        destination_addr: "10.0.0.2:15008".parse().unwrap(),
        hbone_addr: Some("10.0.0.2:80".into()),
        source: Party {
            workload: Some(pod.into()),
            principal: Some("spiffe://t/ns/a/sa/b".into()),
            ..Party::default()
        },
        destination: Party::default(),
        service: None,
        security: Security::MutualTls,
        via: None,
    }
}

/// The value of the series of `metric` that belongs to the workload and flag.
fn value(metric: &str, workload: &str, flag: ResponseFlag) -> Option<u64> {
    let (workload, flag) = (format!("source_workload=\"{workload}\""), format!("response_flags=\"{flag}\""));
    let text = metrics_handle().render();
    let line = text.lines().find(|l| l.starts_with(metric) && l.contains(&workload) && l.contains(&flag))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

#[test]
fn bytes_show_while_the_connection_is_open() {
    let record = TcpRecord::open(connection("still-open"));
    record.bytes().add_received(5);
    record.bytes().add_sent(7);
    let read = |metric| value(metric, "still-open", ResponseFlag::None);
    assert_eq!(read("istio_tcp_connections_opened_total"), Some(1));
    assert_eq!(read("istio_tcp_received_bytes_total"), Some(5));
    assert_eq!(read("istio_tcp_sent_bytes_total"), Some(7));
    record.bytes().add_sent(1);
    record.close(Ok(()));
    assert_eq!(read("istio_tcp_sent_bytes_total"), Some(8));
    assert_eq!(read("istio_tcp_connections_closed_total"), Some(1));
}

#[test]
fn failures_carry_their_flag() {
    TcpRecord::open(connection("refused")).close(Err(Failure::new(ResponseFlag::Deny, "no")));
    drop(TcpRecord::open(connection("refused")));
    let read = |flag| value("istio_tcp_connections_failed_total", "refused", flag);
    assert_eq!(read(ResponseFlag::Deny), Some(1));
    assert_eq!(read(ResponseFlag::Cancelled), Some(1));
    assert_eq!(read(ResponseFlag::None), None);
    assert_eq!(value("istio_tcp_connections_opened_total", "refused", ResponseFlag::None), Some(2));
}

fn party(name: &str) -> Party {
    Party {
        workload: Some(name.into()),
        pod: Some(format!("{name}-1").into()),
        namespace: Some("shop".into()),
        canonical_service: Some(format!("{name}-app").into()),
        canonical_revision: Some("v1".into()),
        cluster: Some("east".into()),
        principal: Some(format!("spiffe://td/ns/shop/sa/{name}").into()),
        region: Some("r".into()),
        zone: Some("z".into()),
    }
}

fn full(direction: Direction, client: &str) -> Connection {
    Connection {
        direction,
        source: party(client),
        destination: party("web"),
        service: Some(ServiceLabels {
            hostname: "web.shop.svc.cluster.local".into(),
            namespace: "shop".into(),
            name: "web".into(),
        }),
        ..connection(client)
    }
}

/// The one line of a metric that has all of `parts`, without its value.
fn series(metric: &str, parts: &[&str]) -> String {
    let text = metrics_handle().render();
    let lines: Vec<_> =
        text.lines().filter(|l| l.starts_with(metric) && parts.iter().all(|part| l.contains(part))).collect();
    let [line] = lines[..] else { panic!("{metric} {parts:?}: {lines:#?}") };
    line.rsplit_once(' ').expect("a value").0.to_owned()
}

#[test]
fn labels_are_istios_in_istios_order() {
    let close = |direction, client| {
        TcpRecord::open(full(direction, client)).close(Err(Failure::new(ResponseFlag::Deny, "no")));
    };
    close(Direction::Outbound, "golden-out");
    close(Direction::Inbound, "golden-in");
    let nobody =
        Connection { source: Party { workload: Some("golden-nobody".into()), ..Party::default() }, ..connection("") };
    TcpRecord::open(Connection { security: Security::Unknown, ..nobody }).close(Ok(()));
    let labels = |reporter: &str, client: &str, flag: &str| {
        [
            format!("{{reporter=\"{reporter}\",source_workload=\"{client}\",source_canonical_service=\"{client}-app\","),
            "source_canonical_revision=\"v1\",source_workload_namespace=\"shop\",".into(),
            format!("source_principal=\"spiffe://td/ns/shop/sa/{client}\",source_app=\"{client}-app\",source_version=\"v1\","),
            "source_cluster=\"east\",destination_service=\"web.shop.svc.cluster.local\",".into(),
            "destination_service_namespace=\"shop\",destination_service_name=\"web\",destination_workload=\"web\",".into(),
            "destination_canonical_service=\"web-app\",destination_canonical_revision=\"v1\",".into(),
            "destination_workload_namespace=\"shop\",destination_principal=\"spiffe://td/ns/shop/sa/web\",".into(),
            "destination_app=\"web-app\",destination_version=\"v1\",destination_cluster=\"east\",".into(),
            format!("request_protocol=\"tcp\",response_flags=\"{flag}\",connection_security_policy=\"mutual_tls\","),
            "source_region=\"r\",source_zone=\"z\",destination_region=\"r\",destination_zone=\"z\"}".into(),
        ]
        .concat()
    };
    for (reporter, client) in [("source", "golden-out"), ("destination", "golden-in")] {
        for metric in ["opened", "received_bytes", "sent_bytes"].map(|what| match what {
            "opened" => "istio_tcp_connections_opened_total".to_owned(),
            bytes => format!("istio_tcp_{bytes}_total"),
        }) {
            assert_eq!(series(&metric, &[client]), metric.clone() + &labels(reporter, client, "-"));
        }
        for metric in ["istio_tcp_connections_closed_total", "istio_tcp_connections_failed_total"] {
            let deny = ["\"DENY\"", client];
            assert_eq!(series(metric, &deny), metric.to_owned() + &labels(reporter, client, "DENY"));
        }
        let open = series("istio_tcp_sockets_open", &[&format!("{reporter:?}")]);
        assert_eq!(open, format!("istio_tcp_sockets_open{{reporter={reporter:?}}}"));
    }
    let unknown = series("istio_tcp_connections_closed_total", &["golden-nobody"]);
    assert_eq!(unknown.matches("=\"unknown\"").count(), 23, "all but four are not known: {unknown}");
}

#[test]
fn names_that_were_looked_up_are_counted_by_who_asked() {
    on_demand_dns(&party("golden-dns"), &"db.example.com".into());
    assert_eq!(
        series("istio_on_demand_dns_total", &["golden-dns"]),
        "istio_on_demand_dns_total{source_workload=\"golden-dns\",source_canonical_service=\"golden-dns-app\",\
         source_canonical_revision=\"v1\",source_workload_namespace=\"shop\",\
         source_principal=\"spiffe://td/ns/shop/sa/golden-dns\",source_app=\"golden-dns-app\",source_version=\"v1\",\
         source_cluster=\"east\",hostname=\"db.example.com\"}"
    );
}

/// What is logged of a connection in which the application sent 3 bytes and got 5, without the time.
async fn logged(
    format: LogFormat,
    level: &'static str,
    connection: Connection,
    outcome: Result<(), Failure>,
) -> Vec<String> {
    let record = std::cell::RefCell::new(None);
    let opened = capture(format, level, || *record.borrow_mut() = Some(TcpRecord::open(connection)));
    let record = record.into_inner().expect("it was opened");
    record.bytes().add_received(3);
    record.bytes().add_sent(5);
    tokio::time::advance(std::time::Duration::from_millis(12)).await;
    let closed = capture(format, level, || record.close(outcome));
    (opened + &closed).lines().map(without_time).collect()
}

fn without_time(line: &str) -> String {
    const TIME: usize = "2026-01-01T00:00:00.000000Z".len();
    match line.split_once("\"time\":\"") {
        Some((before, after)) => format!("{before}\"time\":\"T{}", &after[TIME..]),
        None => format!("T{}", &line[TIME..]),
    }
}

#[tokio::test(start_paused = true)]
async fn the_access_log_is_istios() {
    let source = "src.addr=10.0.0.1:1000 src.workload=\"a-1\" src.namespace=\"shop\" \
        src.identity=\"spiffe://td/ns/shop/sa/a\" src.cluster=\"east\"";
    let rest = "dst.hbone_addr=10.0.0.2:80 dst.service=\"web.shop.svc.cluster.local\" dst.workload=\"web-1\" \
        dst.namespace=\"shop\" dst.identity=\"spiffe://td/ns/shop/sa/web\" dst.cluster=\"east\"";
    let both = format!("{source} dst.addr=10.0.0.2:15008 {rest}");
    assert_eq!(
        logged(LogFormat::Plain, "debug", full(Direction::Outbound, "a"), Ok(())).await,
        [
            format!("T\tdebug\taccess\tconnection opened\t{both} direction=\"outbound\""),
            format!(
                "T\tinfo\taccess\tconnection complete\t{both} direction=\"outbound\" bytes_sent=3 bytes_recv=5 duration=\"12ms\""
            ),
        ]
    );
    let denied = Failure::new(ResponseFlag::Deny, "explicitly \"denied\"\nby x");
    assert_eq!(
        logged(LogFormat::Plain, "info", full(Direction::Inbound, "a"), Err(denied)).await,
        [format!(
            "T\terror\taccess\tconnection complete\t{both} direction=\"inbound\" bytes_sent=5 bytes_recv=3 duration=\"12ms\" \
             error=\"explicitly \\\"denied\\\"\\nby x\" response_flags=\"DENY\""
        )]
    );
    // Of whom nothing is known nothing is said; a workload without a pod goes by its service's name.
    let source = Party { canonical_service: Some("vm".into()), ..Party::default() };
    let passed = Connection { source, hbone_addr: None, security: Security::Unknown, ..connection("x") };
    assert_eq!(
        logged(LogFormat::Plain, "info", passed, Ok(())).await,
        ["T\tinfo\taccess\tconnection complete\tsrc.addr=10.0.0.1:1000 src.workload=\"vm\" dst.addr=10.0.0.2:15008 \
          direction=\"outbound\" bytes_sent=3 bytes_recv=5 duration=\"12ms\""]
    );
    let json =
        logged(LogFormat::Json, "info", full(Direction::Inbound, "a"), Err(Failure::new(ResponseFlag::Deny, "no")))
            .await;
    assert_eq!(
        json,
        [
            r#"{"level":"error","time":"T","scope":"access","message":"connection complete","src.addr":"10.0.0.1:1000","src.workload":"a-1","src.namespace":"shop","src.identity":"spiffe://td/ns/shop/sa/a","src.cluster":"east","dst.addr":"10.0.0.2:15008","dst.hbone_addr":"10.0.0.2:80","dst.service":"web.shop.svc.cluster.local","dst.workload":"web-1","dst.namespace":"shop","dst.identity":"spiffe://td/ns/shop/sa/web","dst.cluster":"east","direction":"inbound","bytes_sent":5,"bytes_recv":3,"duration":"12ms","error":"no","response_flags":"DENY"}"#
        ]
    );
}

#[test]
fn early_refusals_are_warnings() {
    let (source, destination) = ("10.0.0.1:1000".parse().unwrap(), "10.0.0.2:15008".parse().unwrap());
    let line = |format| {
        let log = || refused(Direction::Inbound, source, destination, ResponseFlag::TlsFailure, &"no certificate");
        without_time(&capture(format, "info", log))
    };
    assert_eq!(
        line(LogFormat::Plain),
        "T\twarn\taccess\tconnection failed\tsrc.addr=10.0.0.1:1000 dst.addr=10.0.0.2:15008 direction=\"inbound\" \
         error=\"no certificate\" response_flags=\"TLS_FAILURE\"\n"
    );
    assert_eq!(
        line(LogFormat::Json).trim_end(),
        r#"{"level":"warn","time":"T","scope":"access","message":"connection failed","src.addr":"10.0.0.1:1000","dst.addr":"10.0.0.2:15008","direction":"inbound","error":"no certificate","response_flags":"TLS_FAILURE"}"#
    );
}
