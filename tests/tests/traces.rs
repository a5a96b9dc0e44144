//! A call is one trace from the client to what every member applies, as a collector receives it over OTLP.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};

use d_engine_client::Client;
use d_engine_proto::v1::Consistency;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::wait;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use tracing::Instrument;
use tracing::level_filters::LevelFilter;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;

/// A span, and who sent it.
#[derive(Clone, Debug)]
struct Received {
    service: String,
    node: Option<String>,
    span: Span,
}

impl Received {
    fn attribute(&self, key: &str) -> Option<String> {
        attribute(&self.span.attributes, key)
    }
}

fn attribute(attributes: &[KeyValue], key: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    match &found.value {
        Some(AnyValue { value: Some(Value::StringValue(text)) }) => Some(text.clone()),
        Some(AnyValue { value: Some(Value::IntValue(number)) }) => Some(number.to_string()),
        other => panic!("{key} is {other:?}"),
    }
}

/// Speaks the real protocol, and keeps what it gets.
#[derive(Clone, Default)]
struct FakeCollector(Arc<Mutex<Vec<Received>>>);

#[tonic::async_trait]
impl TraceService for FakeCollector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut received = self.0.lock().unwrap();
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let service = attribute(&attributes, "service.name").unwrap_or_default();
            let node = attribute(&attributes, "service.instance.id");
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                received.push(Received { service: service.clone(), node: node.clone(), span });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// The collector of all tests of this program, and the tracing of its clients, which sends there too.
struct Scene {
    collector: FakeCollector,
    address: SocketAddr,
    tracing: SdkTracerProvider,
    _runtime: tokio::runtime::Runtime,
}

static SCENE: LazyLock<Scene> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let collector = FakeCollector::default();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let service = TraceServiceServer::new(collector.clone());
    runtime.spawn(async move {
        let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
        tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
    });
    let within = runtime.enter();
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(format!("http://{address}"));
    // Room for all that the tests make, since one that makes thousands must not cost the next one its few.
    let batches = BatchConfigBuilder::default()
        .with_scheduled_delay(std::time::Duration::from_millis(50))
        .with_max_queue_size(1 << 16)
        .build();
    let processor = BatchSpanProcessor::builder(exporter.build().unwrap()).with_batch_config(batches).build();
    drop(within);
    let tracing = SdkTracerProvider::builder()
        .with_span_processor(processor)
        .with_resource(Resource::builder_empty().with_service_name("application").build())
        .build();
    let targets = Targets::new()
        .with_target("d_engine_client", LevelFilter::DEBUG)
        .with_target(module_path!(), LevelFilter::DEBUG);
    let layer = tracing_opentelemetry::layer().with_tracer(tracing.tracer("test")).with_filter(targets);
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer)).unwrap();
    Scene { collector, address, tracing, _runtime: runtime }
});

impl Scene {
    fn trace(&self, id: TraceId) -> Vec<Received> {
        let received = self.collector.0.lock().unwrap();
        received.iter().filter(|received| received.span.trace_id == id.to_bytes()).cloned().collect()
    }

    /// The spans of a trace, once `complete` says that all that matter are there.
    async fn traced(&self, id: TraceId, what: &str, complete: impl Fn(&[Received]) -> bool) -> Vec<Received> {
        let _ = self.tracing.force_flush();
        wait::until(what, wait::PATIENCE, || async { Some(self.trace(id)).filter(|spans| complete(spans)) }).await
    }
}

/// A cluster whose nodes send their spans to the fake collector, and a client whose session is open.
async fn traced_cluster(shape: Shape) -> (Cluster, Client) {
    let extra = format!("otlp_endpoint = \"http://{}\"\n{}", SCENE.address, shape.extra);
    let mut cluster = Cluster::prepare(Shape { extra, ..shape }).await;
    cluster.start_all().await;
    let client = Client::builder().endpoints(cluster.addresses()).call_timeout(wait::PATIENCE).build().unwrap();
    client.put("warm", "up").await.unwrap();
    (cluster, client)
}

fn named<'a>(spans: &'a [Received], name: &str, kind: SpanKind) -> Vec<&'a Received> {
    spans.iter().filter(|received| received.span.name == name && received.span.kind == kind as i32).collect()
}

fn child_of(parents: &[&Received]) -> impl Fn(&&Received) -> bool {
    let ids: Vec<Vec<u8>> = parents.iter().map(|parent| parent.span.span_id.clone()).collect();
    move |child| ids.contains(&child.span.parent_span_id)
}

/// The nodes that applied something proposed in this trace.
fn appliers(spans: &[Received]) -> BTreeSet<String> {
    let proposals = named(spans, "propose", SpanKind::Internal);
    let applied = named(spans, "apply", SpanKind::Internal).into_iter().filter(child_of(&proposals));
    applied.filter_map(|apply| apply.node.clone()).collect()
}

fn everybody() -> BTreeSet<String> {
    ["1", "2", "3"].map(str::to_owned).into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_is_one_trace_from_the_application_to_what_every_member_applies() {
    let (_cluster, client) = traced_cluster(Shape::default()).await;
    let application = tracing::info_span!("application");
    let id = application.context().span().span_context().trace_id();
    let answer = client.put("k", "v").into_future().instrument(application.clone()).await.unwrap();
    drop(application);
    let spans = SCENE
        .traced(id, "all spans of the put", |spans| {
            appliers(spans) == everybody() && !named(spans, "application", SpanKind::Internal).is_empty()
        })
        .await;

    let root = named(&spans, "application", SpanKind::Internal);
    let call: Vec<_> = named(&spans, "d_engine_call", SpanKind::Internal).into_iter().filter(child_of(&root)).collect();
    assert_eq!(call.len(), 1, "{spans:#?}");
    assert_eq!((call[0].service.as_str(), call[0].attribute("operation").as_deref()), ("application", Some("put")));
    let attempts: Vec<_> =
        named(&spans, "d_engine.v1.Kv/Put", SpanKind::Client).into_iter().filter(child_of(&call)).collect();
    let attempt = attempts.last().expect("an attempt");
    assert_eq!(attempt.attribute("rpc.system").as_deref(), Some("grpc"));
    assert_eq!(attempt.attribute("rpc.service").as_deref(), Some("d_engine.v1.Kv"));
    assert_eq!(attempt.attribute("rpc.method").as_deref(), Some("Put"));
    assert!(attempt.attribute("server.port").is_some(), "{attempt:#?}");
    let served: Vec<_> =
        named(&spans, "d_engine.v1.Kv/Put", SpanKind::Server).into_iter().filter(child_of(&attempts)).collect();
    assert_eq!(served.len(), attempts.len(), "every attempt was served: {spans:#?}");
    assert!(served.iter().all(|served| served.service == "d-engine"));
    let leader = answer.header.node_id.to_string();
    let proposals: Vec<_> =
        named(&spans, "propose", SpanKind::Internal).into_iter().filter(child_of(&served)).collect();
    assert!(proposals.iter().any(|proposal| proposal.node.as_ref() == Some(&leader)), "{spans:#?}");
    let applied = named(&spans, "apply", SpanKind::Internal);
    let revisions: BTreeSet<_> = applied.iter().map(|apply| apply.attribute("d_engine.revision")).collect();
    assert_eq!(revisions, [Some(answer.header.revision.to_string())].into());
    let entries: BTreeSet<_> = applied.iter().map(|apply| apply.attribute("d_engine.log_index")).collect();
    assert_eq!(entries.len(), 1, "every member applies the same entry: {spans:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_that_nobody_records_leaves_no_span_anywhere() {
    let (_cluster, client) = traced_cluster(Shape::default()).await;
    let id = TraceId::from_bytes([0x5a; 16]);
    let parent = SpanContext::new(id, SpanId::from_bytes([1; 8]), TraceFlags::default(), true, TraceState::default());
    let unrecorded = tracing::info_span!("application");
    unrecorded.set_parent(opentelemetry::Context::new().with_remote_span_context(parent)).unwrap();
    client.put("k", "1").into_future().instrument(unrecorded).await.unwrap();

    // What comes later arrives later: once a trace of each member is here, that of the first put would be.
    let recorded = tracing::info_span!("application");
    let later = recorded.context().span().span_context().trace_id();
    client.put("k", "2").into_future().instrument(recorded).await.unwrap();
    SCENE.traced(later, "the spans of the later put", |spans| appliers(spans) == everybody()).await;
    assert_eq!(SCENE.trace(id).len(), 0, "{:#?}", SCENE.trace(id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_that_was_sent_twice_is_one_call_with_two_attempts() {
    // So that a busy machine holds no election that nobody could tell the client of.
    let extra = "[raft.read_consistency]\nlease_duration_ms = 1000\n".to_owned();
    let (cluster, client) = traced_cluster(Shape { proxied: true, extra, ..Shape::default() }).await;
    for node in cluster.nodes() {
        node.proxy.as_ref().unwrap().lose_answers();
    }
    let application = tracing::info_span!("application");
    let id = application.context().span().span_context().trace_id();
    let put = tokio::spawn(client.put("k", "v").into_future().instrument(application));
    // Asked behind the proxies.
    let applied = || async {
        for node in cluster.nodes() {
            let found = node.direct(wait::PATIENCE).get("k", Consistency::Eventual, 0).await.ok()?;
            if found.kv.is_some() {
                return Some(());
            }
        }
        None
    };
    wait::until("the put to be applied", wait::PATIENCE, applied).await;
    for node in cluster.nodes() {
        node.proxy.as_ref().unwrap().cut();
    }
    put.await.unwrap().unwrap();
    let attempts_of = |spans: &[Received]| {
        let puts: Vec<_> = named(spans, "d_engine_call", SpanKind::Internal)
            .into_iter()
            .filter(|call| call.attribute("operation").as_deref() == Some("put"))
            .cloned()
            .collect();
        let calls: Vec<_> = puts.iter().collect();
        let attempts: Vec<_> = named(spans, "d_engine.v1.Kv/Put", SpanKind::Client)
            .into_iter()
            .filter(child_of(&calls))
            .cloned()
            .collect();
        (puts, attempts)
    };
    let spans = SCENE
        .traced(id, "the call and its attempts", |spans| {
            attempts_of(spans).0.len() == 1 && appliers(spans) == everybody()
        })
        .await;
    let (_, attempts) = attempts_of(&spans);
    assert!(attempts.len() >= 2, "{spans:#?}");
    let failed = attempts.iter().filter(|attempt| attempt.attribute("error.type").is_some()).count();
    assert_eq!(failed, attempts.len() - 1, "all but the last one failed: {attempts:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_begins_traces_itself_when_it_is_told_to() {
    let extra = "otlp_sample_ratio = 1.0".to_owned();
    let (cluster, _client) = traced_cluster(Shape { nodes: 1, extra, ..Shape::default() }).await;
    let answer = cluster.node(1).direct(wait::PATIENCE).put("by-hand", "v").await.unwrap();
    let revision = answer.header.unwrap_or_default().revision.to_string();
    let begun = || async {
        let received = SCENE.collector.0.lock().unwrap().clone();
        let roots: Vec<_> = named(&received, "d_engine.v1.Kv/Put", SpanKind::Server)
            .into_iter()
            .filter(|served| served.span.parent_span_id.is_empty())
            .collect();
        let proposals: Vec<_> =
            named(&received, "propose", SpanKind::Internal).into_iter().filter(child_of(&roots)).collect();
        let applied = named(&received, "apply", SpanKind::Internal).into_iter().filter(child_of(&proposals));
        let ours = |apply: &&Received| apply.attribute("d_engine.revision").as_deref() == Some(&revision);
        applied.filter(ours).count().checked_sub(1)
    };
    wait::until("a trace that begins with the server", wait::PATIENCE, begun).await;
}

/// Traced puts go on, and the server stops, whatever becomes of its spans.
async fn goes_on_without(collector: SocketAddr) {
    LazyLock::force(&SCENE);
    let extra = format!("otlp_endpoint = \"http://{collector}\"");
    let mut cluster = Cluster::prepare(Shape { nodes: 1, extra, ..Shape::default() }).await;
    cluster.start_all().await;
    let client = Client::builder().endpoints(cluster.addresses()).call_timeout(wait::PATIENCE).build().unwrap();
    for round in 0..10 {
        // More spans than the queue holds: a call, a proposal and what it applies.
        let puts = (0..400).map(|put| {
            let put = client.put(format!("{round}-{put}"), "v").into_future();
            tokio::spawn(put.instrument(tracing::info_span!("application")))
        });
        for put in puts.collect::<Vec<_>>() {
            put.await.unwrap().unwrap();
        }
    }
    cluster.node_mut(1).stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_not_there_stops_nobody() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    goes_on_without(nobody).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_never_answers_stops_nobody() {
    // Connections are accepted by the kernel, and nobody reads.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    goes_on_without(silent.local_addr().unwrap()).await;
}
