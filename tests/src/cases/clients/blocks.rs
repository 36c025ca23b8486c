//! Tools that speak NBD or use the block device: fio with verify, libnbd's, QEMU's.

use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::cases::{Case, Stage, says, spoil};
use crate::lab::copies::Copy;
use crate::lab::filesystem::device_of;
use crate::lab::pair::{LIMIT, VOLUME};
use crate::lab::{Pair, PairOptions, Seed, Server, system};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "CLIENT-6",
        sabotage: "a block of beta's copy is changed between fio's writing and its verifying there",
        run: fio_verifies,
        ends_mirrored: true,
        limit_s: 240,
    },
    Case {
        name: "CLIENT-7",
        sabotage: "a block of beta's copy is changed after the volume was copied in",
        run: images_in_and_out,
        ends_mirrored: true,
        limit_s: 240,
    },
];

const TOOL_LIMIT: Duration = Duration::from_secs(120);

fn uri(server: &Server) -> String {
    format!("nbd+unix:///{VOLUME}?socket={}", server.nbd().display())
}

/// fio's words: where, what, and that what is read must be what was written.
fn fio_words(target: &[String], options: &str) -> Vec<String> {
    let mut words: Vec<String> =
        "fio --thread --group_reporting --randrepeat=1 --verify=crc32c --verify_fatal=1 \
         --verify_state_save=0"
            .split_whitespace()
            .map(str::to_owned)
            .collect();
    words.extend(target.iter().cloned());
    words.extend(options.split_whitespace().map(str::to_owned));
    words
}

fn over_nbd(server: &Server) -> Vec<String> {
    vec!["--ioengine=nbd".to_owned(), format!("--uri={}", uri(server))]
}

fn over_device(device: &Path) -> Vec<String> {
    let file = format!("--filename={}", device.display());
    vec!["--ioengine=libaio".to_owned(), "--direct=1".to_owned(), file]
}

fn fio(words: &[String]) -> Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let said = system::run(&words, TOOL_LIMIT)?;
    ensure!(said.contains("err= 0"), "fio: {said}");
    Ok(())
}

fn in_background(words: Vec<String>) -> JoinHandle<Result<()>> {
    std::thread::spawn(move || fio(&words))
}

fn join(running: JoinHandle<Result<()>>) -> Result<()> {
    running.join().map_err(|_| anyhow!("the thread that runs fio panicked"))?
}

/// Random writes of each 4 KiB of a part of the volume; the same words with `--verify_only` read them again.
const WHOLE: &str = "--name=whole --rw=randwrite --bs=4k --iodepth=16 --size=48m";

fn fio_verifies(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let options = PairOptions { volume_bytes: 128 << 20, frontend: "fuse", ..PairOptions::default() };
    let pair = stage.pair(options)?;
    pair.start_mirrored()?;
    let device = device_of(&pair.alpha)?;
    let (nbd, block) = (over_nbd(&pair.alpha), over_device(&device));
    fio(&fio_words(&nbd, "--name=mixed --rw=randrw --bsrange=4k-1m --iodepth=32 --size=64m"))?;
    fio(&fio_words(&nbd, "--name=odd --rw=randwrite --bsrange=4k-64k --iodepth=1 --size=4m --fsync=8"))?;
    fio(&fio_words(&block, "--name=deep --rw=randwrite --bs=4k --iodepth=32 --size=24m --offset=64m"))?;
    fio(&fio_words(
        &block,
        "--name=mixed --rw=randrw --bsrange=4k-512k --iodepth=8 --size=48m --offset=64m",
    ))?;
    over_a_loss(pair, &nbd, &block)?;
    pair.alpha.must(&["switchover"])?;
    pair.beta.wait("role=primary", LIMIT)?;
    if sabotage {
        spoil(&pair.beta, 1000)?;
    }
    for target in [over_nbd(&pair.beta), over_device(&device_of(&pair.beta)?)] {
        fio(&fio_words(&target, &format!("{WHOLE} --verify_only"))).context("read again on beta")?;
    }
    Ok(())
}

/// Writes over NBD and over the device while the secondary dies and returns; both are verified when it is back.
fn over_a_loss(pair: &mut Pair, nbd: &[String], block: &[String]) -> Result<()> {
    let writer = in_background(fio_words(nbd, &format!("{WHOLE} --do_verify=0 --rate=16m")));
    let other = "--name=beside --rw=randwrite --bs=8k --iodepth=8 --size=48m --offset=64m --rate=16m";
    let beside = in_background(fio_words(block, other));
    let result: Result<()> = (|| {
        pair.beta.kill()?;
        pair.alpha.wait("alone", LIMIT)?;
        ensure!(
            !writer.is_finished() && !beside.is_finished(),
            "fio ended before the secondary's death was seen"
        );
        pair.alpha.wait_status("marks of the writes", |status| status["volumes"][0]["dirty_blocks"] != 0)?;
        pair.beta.boot(false)?;
        pair.beta.start_daemon()
    })();
    let (written, verified) = (join(writer), join(beside));
    result?;
    written.context("fio over NBD, over the loss of the secondary")?;
    verified.context("fio over the device, over the loss of the secondary")?;
    pair.wait_mirrored()
}

fn images_in_and_out(stage: &mut Stage) -> Result<()> {
    let sabotage = stage.sabotage;
    let pair = stage.pair(PairOptions { frontend: "fuse", ..PairOptions::default() })?;
    pair.start_mirrored()?;
    let size = pair.volume_bytes()?;
    let text = |name: &str| pair.directory().join(name).display().to_string();
    let (from, to) = (text("in"), text("out"));
    std::fs::write(&from, image(size)?)?;
    let uri = uri(&pair.alpha);
    described(&uri, size)?;
    tool(&["nbdcopy", "--flush", "--connections=4", &from, &uri])?;
    same_everywhere(pair, &from, size)?;
    for extra in [&["--synchronous"][..], &["--connections=4", "--requests=16", "--request-size=1048576"]] {
        tool(&[&["nbdcopy"], extra, &[uri.as_str(), to.as_str()]].concat())?;
        ensure!(digest(&to, size)? == digest(&from, size)?, "nbdcopy out gave another image");
    }
    if sabotage {
        spoil(&pair.beta, 321)?;
    }
    pair.alpha.must(&["switchover"])?;
    pair.beta.wait("role=primary", LIMIT)?;
    let uri = self::uri(&pair.beta);
    tool(&["nbdcopy", &uri, &to])?;
    ensure!(digest(&to, size)? == digest(&from, size)?, "nbdcopy out of beta gave another image");
    says(&tool(&["qemu-img", "compare", "-f", "raw", "-F", "raw", &from, &uri])?, &["identical"])?;
    patterns(&uri)?;
    through_qcow2(pair, &from, &uri, size)
}

/// What nbdinfo is told.
fn described(uri: &str, size: u64) -> Result<()> {
    let info = tool(&["nbdinfo", "--json", uri])?;
    let size = format!("\"export-size\": {size}");
    let wanted = [
        size.as_str(),
        "\"can_multi_conn\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"is_read_only\": false",
    ];
    says(&info, &wanted).context("nbdinfo")?;
    says(&tool(&["nbdinfo", "--map", uri])?, &["data"]).map(drop)
}

/// Patterns written, zeroed, discarded and read by qemu-io, also through its own cache mode and as FUA.
fn patterns(uri: &str) -> Result<()> {
    let commands = [
        "write -P 0xab 0 256k",
        "write -P 0xcd -f 64k 4k",
        "aio_write -P 0x11 1M 2M",
        "aio_write -P 0x22 4M 64k",
        "aio_flush",
        "read -P 0xab 0 64k",
        "read -P 0xcd 64k 4k",
        "read -P 0x11 1M 2M",
        "write -z 4k 8k",
        "read -P 0 4k 8k",
        "read -P 0xab 12k 4k",
        "write -z -u 1M 1M",
        "read -P 0 1M 1M",
        "read -P 0x11 2M 1M",
        "discard 4M 64k",
        "read -P 0 4M 64k",
        "flush",
    ];
    let mut words = vec!["qemu-io", "-f", "raw", "-t", "none"];
    words.extend(commands.iter().flat_map(|command| ["-c", command]));
    words.push(uri);
    let said = tool(&words)?;
    ensure!(!said.contains("verification failed") && !said.contains("rror"), "qemu-io: {said}");
    Ok(())
}

/// An image in QEMU's own format is unpacked onto the volume, and the volume packed into one.
fn through_qcow2(pair: &Pair, from: &str, uri: &str, size: u64) -> Result<()> {
    let packed = pair.directory().join("packed").display().to_string();
    let out = pair.directory().join("unpacked").display().to_string();
    tool(&["qemu-img", "convert", "-f", "raw", "-O", "qcow2", from, &packed])?;
    tool(&["qemu-img", "convert", "-n", "-t", "none", "-f", "qcow2", "-O", "raw", &packed, uri])?;
    same_everywhere(pair, from, size)?;
    tool(&["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, &out])?;
    ensure!(digest(&out, size)? == digest(from, size)?, "qemu-img convert gave another image");
    Ok(())
}

/// Both copies have the image's bytes.
fn same_everywhere(pair: &Pair, image: &str, size: u64) -> Result<()> {
    let wanted = digest(image, size)?;
    for server in [&pair.alpha, &pair.beta] {
        let there = server.copy(size)?.digest()?;
        ensure!(there == wanted, "{}'s copy has another content than the image", server.name());
    }
    Ok(())
}

fn digest(image: &str, size: u64) -> Result<u64> {
    Copy::open_at(Path::new(image), 0, size)?.digest()
}

/// An image of noise with a quarter of zeroes, in pieces of 64 KiB.
fn image(size: u64) -> Result<Vec<u8>> {
    const PIECE: usize = 64 << 10;
    let mut seed = Seed::new(77);
    let mut bytes = Vec::with_capacity(usize::try_from(size)?);
    while (bytes.len() as u64) < size {
        if seed.once_in(4) {
            bytes.resize(bytes.len() + PIECE, 0);
        } else {
            bytes.extend((0..PIECE / 8).flat_map(|_| seed.bits().to_le_bytes()));
        }
    }
    Ok(bytes)
}

fn tool(words: &[&str]) -> Result<String> {
    system::run(words, TOOL_LIMIT)
}
