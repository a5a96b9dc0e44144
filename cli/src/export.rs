//! Sends the server's spans to a collector, over OTLP.
//!
//! A thread of its own sends them, from a queue of bounded length: what does not fit is dropped and counted in the log.
//! So a collector that is slow, silent or gone costs spans and nothing else.

use std::time::Duration;

use d_engine_server::config::MonitoringConfig;
use d_engine_server::trace::{ROOT_TARGET, TARGET};
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider};
use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

use crate::failure::Failure;

/// Spans that wait to be sent.
const QUEUE_SPANS_MAX: usize = 8192;
/// Spans sent at once.
const BATCH_SPANS_MAX: usize = 512;
/// How long a span waits for others.
const SEND_PERIOD: Duration = Duration::from_secs(1);
/// For how long a collector may leave a batch unanswered.
const SEND_TIMEOUT: Duration = Duration::from_secs(3);
/// For how long a server that stops goes on sending.
const FAREWELL: Duration = Duration::from_secs(2);

/// Sends what is left when it is dropped, for two seconds at most.
#[must_use]
#[derive(Debug)]
pub(crate) struct Export {
    provider: SdkTracerProvider,
    roots: bool,
}

impl Export {
    /// Starts to send to the configured collector; `None` if there is none. Must be called within a runtime, whose
    /// threads do the input and output: it must outlive what is returned.
    pub(crate) fn start(node: u32, monitoring: &MonitoringConfig) -> Result<Option<Self>, Failure> {
        let Some(endpoint) = &monitoring.otlp_endpoint else { return Ok(None) };
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .with_timeout(SEND_TIMEOUT)
            .build()
            .map_err(|error| Failure::Usage(format!("monitoring.otlp_endpoint: {error}")))?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE_SPANS_MAX)
            .with_max_export_batch_size(BATCH_SPANS_MAX)
            .with_scheduled_delay(SEND_PERIOD)
            .build();
        let instance = KeyValue::new("service.instance.id", node.to_string());
        let resource = Resource::builder().with_service_name("d-engine").with_attribute(instance).build();
        let root = Sampler::TraceIdRatioBased(monitoring.otlp_sample_ratio);
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
            .with_sampler(Sampler::ParentBased(Box::new(root)))
            .with_resource(resource)
            .build();
        Ok(Some(Self { provider, roots: monitoring.otlp_sample_ratio > 0.0 }))
    }

    /// What takes the spans from `tracing`: those of traced calls, and no others.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span>,
    {
        let roots = if self.roots { LevelFilter::DEBUG } else { LevelFilter::OFF };
        let targets = Targets::new().with_target(TARGET, Level::DEBUG).with_target(ROOT_TARGET, roots);
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("d-engine"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_context_activation(false)
            .with_filter(targets)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FAREWELL) {
            tracing::warn!(%error, "spans were not sent before the end");
        }
    }
}
