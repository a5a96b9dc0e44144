//! A small disk for one node, which can be filled up and slowed down. It needs mounts of one's own: see
//! [`crate::network::enter`].

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::process::bound_to_this_thread;

/// What the neighbour on a slow disk writes at a time, each time waiting for the disk.
const NEIGHBOUR_BLOCK: &str = "bs=4M";

/// Whether a disk of one's own can be made here.
///
/// # Errors
/// The reason why not.
pub fn available() -> Result<(), String> {
    let output = Command::new("losetup").arg("--find").output().map_err(|error| format!("losetup: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Command::new("mkfs.ext4").arg("-V").output().map(drop).map_err(|error| format!("mkfs.ext4: {error}"))
}

/// A mounted disk. Taken away when dropped, also while files on it are open.
#[derive(Debug)]
pub struct Disk {
    place: PathBuf,
    /// The file that is the disk, unless it is in memory.
    image: Option<PathBuf>,
    neighbour: Option<Child>,
}

impl Disk {
    /// Mounts a disk in memory at `place`: small and quick.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn in_memory(place: &Path, mebibytes: u32) -> Self {
        std::fs::create_dir_all(place).expect("the place can be made");
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"]).arg(place));
        Self { place: place.to_owned(), image: None, neighbour: None }
    }

    /// Mounts a file system of its own, kept in a file beside `place`: what is made durable on it is made durable on the
    /// machine's disk.
    ///
    /// # Panics
    /// When it cannot be made or mounted.
    #[must_use]
    pub fn in_file(place: &Path, mebibytes: u32) -> Self {
        std::fs::create_dir_all(place).expect("the place can be made");
        let image = place.with_extension("disk");
        let file = File::create(&image).expect("the image can be made");
        file.set_len(u64::from(mebibytes) << 20).expect("the image can grow");
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(place));
        let _ = std::fs::remove_dir(place.join("lost+found"));
        Self { place: place.to_owned(), image: Some(image), neighbour: None }
    }

    /// Leaves no byte free.
    ///
    /// # Panics
    /// When the disk refuses for another reason.
    pub fn fill(&self) {
        let mut ballast = File::create(self.ballast()).expect("a file can be made");
        for block in [vec![0; 1 << 20], vec![0; 1]] {
            let full = loop {
                if let Err(full) = ballast.write_all(&block) {
                    break full;
                }
            };
            assert_eq!(full.kind(), ErrorKind::StorageFull);
        }
    }

    /// Gives back what [`fill`](Self::fill) took.
    ///
    /// # Panics
    /// When it was not filled.
    pub fn free(&self) {
        std::fs::remove_file(self.ballast()).expect("it was filled");
    }

    /// Gives the disk a neighbour that writes as fast as it can and waits for the disk each time, so that everybody else
    /// waits long for theirs. It keeps overwriting the same few blocks.
    ///
    /// # Panics
    /// When it has one already, or the program cannot be started.
    pub fn slow_down(&mut self) {
        assert!(self.neighbour.is_none(), "the disk is slow already");
        let again = format!(
            "while dd if=/dev/zero of={} {NEIGHBOUR_BLOCK} count=4 oflag=dsync conv=notrunc; do :; done",
            self.place.join("neighbour").display()
        );
        let mut command = bound_to_this_thread(Path::new("sh"));
        command.args(["-c", &again]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.neighbour = Some(command.spawn().expect("sh runs"));
    }

    /// Takes the neighbour away.
    pub fn speed_up(&mut self) {
        if let Some(mut neighbour) = self.neighbour.take() {
            // It may have ended by itself, as on a full disk.
            let _ = neighbour.kill();
            let _ = neighbour.wait();
        }
        let _ = std::fs::remove_file(self.place.join("neighbour"));
    }

    fn ballast(&self) -> PathBuf {
        self.place.join("ballast")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.speed_up();
        // Where it fails, the mount ends with the test's namespace.
        let _ = Command::new("umount").arg("--lazy").arg(&self.place).status();
        if let Some(image) = &self.image {
            let _ = std::fs::remove_file(image);
        }
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
