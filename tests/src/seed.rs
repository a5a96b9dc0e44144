//! Where the randomness of a test comes from.

/// The seed that the environment variable `SEED` gives, or a random one; printed, so that a run can be repeated.
///
/// # Panics
/// When `SEED` is no number.
#[must_use]
pub fn seed() -> u64 {
    let given = std::env::var("SEED").ok().map(|seed| seed.parse().expect("SEED is a number"));
    let seed = given.unwrap_or_else(|| fastrand::u64(..1_000_000));
    println!("seed {seed}: `SEED={seed}` gives this one again");
    seed
}
