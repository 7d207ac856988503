//! Tests the command line: what is accepted, its meaning, and what is refused.

use super::serial::SERIAL_MAX;
use super::*;
use crate::size::Size;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(arguments(line.split_whitespace().map(OsString::from))).and_then(Cli::consistent)
}

fn serve(line: &str) -> ServeArgs {
    match parse(line).expect("a right command line").command {
        Some(Command::Serve(serve)) => *serve,
        other => panic!("{other:?}"),
    }
}

fn refused(line: &str) -> String {
    let error = parse(line).expect_err(line);
    assert_eq!(error.exit_code(), 2, "{line}");
    error.to_string()
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn serve_has_the_defaults_of_the_design() {
    let options = serve("strata serve --blk-file a.qcow2 --socket-path s");
    assert_eq!(options.blk_file.as_deref(), Some(Path::new("a.qcow2")));
    assert_eq!(options.socket_path.as_deref(), Some(Path::new("s")));
    assert_eq!((options.num_queues, options.queue_size, options.read_only), (64, 1024, false));
    assert_eq!(options.map_cache_size, Size(32 << 20));
    assert_eq!(options.poll_max, 100);
    assert_eq!((options.chain.format, options.chain.cache), (ImageFormat::Qcow2, Cache::Direct));
    assert_eq!((options.backing_cache, options.aio), (Cache::Writeback, Aio::Auto));
    assert_eq!((options.chain.backing_format, options.serial, options.socket_mode), (None, None, None));
}

#[test]
fn serve_takes_every_option() {
    let options = serve(
        "strata serve --image=d.img --socket=s --format=raw --backing-format=qcow2 --read-only --num-queues=4 \
         --queue-size=256 --cache=writeback --serial=abc --map-cache-size=1G --poll-max=0 --socket-mode=0660 --socket-group=kvm \
         --log-level=debug",
    );
    assert_eq!(options.chain.format, ImageFormat::Raw);
    assert_eq!(options.chain.backing_format, Some(ImageFormat::Qcow2));
    assert_eq!(options.chain.cache, Cache::Writeback);
    assert_eq!((options.num_queues, options.queue_size, options.read_only), (4, 256, true));
    assert_eq!(options.map_cache_size, Size(1 << 30));
    assert_eq!(options.poll_max, 0);
    assert_eq!((options.socket_mode, options.socket_group.as_deref()), (Some(0o660), Some("kvm")));
    assert_eq!(&options.serial.expect("given").0, b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(serve("strata serve --blk-file a --fd 3").fd, Some(3));
    let below = "--backing-data-file=b.qcow2=c=d --backing-data-file e=f";
    let apart = serve(&format!("strata serve --blk-file a --fd 3 --data-file=b.data {below}"));
    assert_eq!(apart.data.data_file.as_deref(), Some(Path::new("b.data")));
    let pairs = [("b.qcow2", "c=d"), ("e", "f")].map(|(layer, file)| (layer.into(), file.into()));
    assert_eq!(apart.data.backing_data_file, pairs);
    let waits = serve("strata serve --blk-file a --fd 3 --on-enospc wait");
    assert_eq!((options.on_enospc, waits.on_enospc), (OnEnospc::Report, OnEnospc::Wait));
    assert_eq!((options.detect_zeroes, options.discard), (DetectZeroes::Off, Discard::Unmap));
    assert!(!options.discard_no_unref);
    let other =
        serve("strata serve --blk-file a --fd 3 --detect-zeroes on --discard ignore --discard-no-unref");
    assert_eq!((other.detect_zeroes, other.discard), (DetectZeroes::On, Discard::Ignore));
    assert!(other.discard_no_unref);
    let other = serve("strata serve --blk-file a --fd 3 --backing-cache direct --aio threads");
    assert_eq!((other.backing_cache, other.aio), (Cache::Direct, Aio::Threads));
}

#[test]
fn wrong_usage_is_refused() {
    let whole = "strata serve --blk-file a --socket-path s";
    for (line, says) in [
        ("strata serve --socket-path s", "--blk-file"),
        ("strata serve --blk-file a", "--socket-path"),
        ("strata serve --blk-file a --fd 3 --socket-path s", "cannot be used with"),
        ("strata serve --blk-file a --fd -1", "-1"),
        ("strata serve --blk-file a --fd 3 --socket-mode 600", "cannot be used with"),
        (&format!("{whole} --format vmdk"), "vmdk"),
        (&format!("{whole} --num-queues 0"), "1..=256"),
        (&format!("{whole} --num-queues 257"), "1..=256"),
        (&format!("{whole} --queue-size 1000"), "power of two"),
        (&format!("{whole} --queue-size 1"), "power of two"),
        (&format!("{whole} --queue-size 65536"), "power of two"),
        (&format!("{whole} --serial 123456789012345678901"), "at most 20"),
        (&format!("{whole} --serial é"), "ASCII"),
        (&format!("{whole} --detect-zeroes unmap --discard ignore"), "gives space back"),
        (&format!("{whole} --discard on"), "ignore"),
        (&format!("{whole} --map-cache-size 32X"), "K, M, G"),
        (&format!("{whole} --map-cache-size 1K"), "64K"),
        (&format!("{whole} --map-cache-size 1T"), "64G"),
        (&format!("{whole} --poll-max 10001"), "10000"),
        (&format!("{whole} --backing-data-file b.qcow2"), "with = between"),
        (&format!("{whole} --backing-data-file =c"), "with = between"),
        (&format!("{whole} --socket-mode 0888"), "octal"),
        (&format!("{whole} --socket-mode 7777"), "octal"),
        (&format!("{whole} --socket-mode +77"), "octal"),
        (&format!("{whole} --log-level loud"), "level"),
        ("strata info", "FILE"),
        ("strata resize a", "SIZE"),
        ("strata resize a 1X", "K, M, G"),
        ("strata resize a --size", "K, M, G"),
        ("strata serv", "serve"),
    ] {
        let said = refused(line);
        assert!(said.contains(says), "{line}: {said}");
    }
}

#[test]
fn resize_takes_a_size_with_a_sign_wherever_the_option_stands() {
    let resize = |line: &str| match parse(line).expect(line).command {
        Some(Command::Resize(resize)) => resize,
        other => panic!("{other:?}"),
    };
    let less = SizeChange::Less(Size(1 << 30));
    for line in [
        "strata resize --shrink a -1G",
        "strata resize a --shrink -1G",
        "strata resize --format raw --shrink a -1G",
    ] {
        let options = resize(line);
        assert_eq!((options.shrink, options.size, options.image.as_path()), (true, less, Path::new("a")));
    }
    assert_eq!(resize("strata resize a -1G").size, less);
    assert!(!resize("strata resize a +512").shrink);
    assert_eq!(resize("strata resize a +512").size, SizeChange::More(Size(512)));
    assert_eq!(resize("strata resize a 40G").size, SizeChange::To(Size(40 << 30)));
}

#[test]
fn the_names_of_qemu_img_are_taken_too() {
    let options = serve("strata serve a.qcow2 --socket-path s -f raw");
    assert_eq!((options.image(), options.chain.format), (Some(Path::new("a.qcow2")), ImageFormat::Raw));
    assert_eq!(serve("strata serve --blk-file b --fd 3").image(), Some(Path::new("b")));
    assert!(refused("strata serve a --blk-file b --fd 3").contains("cannot be used with"));
    for (line, json) in [
        ("strata info -f qcow2 --output=json a", true),
        ("strata info --output human a", false),
        ("strata check -f qcow2 --output=json a", true),
        ("strata check --json a", true),
        ("strata snapshot -l --output=json a", true),
        ("strata snapshot -l -U --chain-root / --data-file d a", false),
    ] {
        assert_eq!(parse(line).expect(line).command.expect("one").prints_json(), json, "{line}");
    }
    refused("strata info --json --output=human a");
    refused("strata snapshot -U -d x a");
}

#[test]
fn help_has_headings_and_no_line_wider_than_its_limit() {
    for command in ["serve", "info", "check", "snapshot", "resize"] {
        let program = Cli::command();
        let command = program.find_subcommand(command).expect("there").clone();
        let help = command.term_width(60).render_help().to_string();
        let options = help.lines().filter(|line| line.starts_with("          "));
        assert!(options.clone().count() > 3, "{help}");
        assert!(options.clone().all(|line| line.len() <= 60), "{help}");
    }
    let help = Cli::command().find_subcommand_mut("serve").expect("there").render_help().to_string();
    for heading in [IMAGE, SOCKET, DEVICE, SPACE, HOST_IO] {
        assert!(help.contains(&format!("\n{heading}:\n")), "{heading} is missing in:\n{help}");
    }
}

#[test]
fn capabilities_need_nothing_else() {
    assert!(parse("strata --print-capabilities").expect("right").print_capabilities);
    assert!(serve("strata serve --print-capabilities").print_capabilities);
    assert!(serve("strata serve --print-capabilities --blk-file a").print_capabilities);
}

#[test]
fn the_backend_name_means_serve() {
    assert_eq!(serve("/usr/libexec/strata-blk --blk-file a --fd=7 --read-only").fd, Some(7));
    assert!(serve("strata-blk --print-capabilities").print_capabilities);
    assert_eq!(arguments(std::iter::empty()), Vec::<OsString>::new());
}

#[test]
fn help_has_the_command_lines_of_both_machines() {
    let help = Cli::command().find_subcommand_mut("serve").expect("there").render_long_help().to_string();
    for part in ["memory-backend-memfd", "share=on", "vhost-user-blk-pci", "vhost_user=true", "--format raw"]
    {
        assert!(help.contains(part), "{part}");
    }
}

#[test]
fn serials_of_images_are_stable_plain_and_different() {
    let of = |name: &str| {
        let serial = Serial::of_image(Path::new(name)).0;
        let length = serial.iter().position(|byte| *byte == 0).unwrap_or(SERIAL_MAX);
        assert!(serial[length..].iter().all(|byte| *byte == 0), "{name}");
        String::from_utf8(serial[..length].to_vec()).expect("ASCII")
    };
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["one", "two"] {
        std::fs::create_dir(folder.path().join(name)).expect("made");
    }
    std::os::unix::fs::symlink("one", folder.path().join("alias")).expect("a link");
    let within = |name: &str| of(folder.path().join(name).to_str().expect("a plain name"));
    assert_ne!(within("one/disk.qcow2"), within("two/disk.qcow2"), "the same name in two folders");
    assert_eq!(within("one/disk.qcow2"), within("two/../alias/disk.qcow2"), "one folder by two names");
    assert_eq!(of("/var/none/vm.qcow2"), "vm-b0b05c2c");
    assert!(of("/var/none/exactly-twenty-chars.img").starts_with("exactly-twe-"));
    assert!(of("a b.img").starts_with("a_b-"));
    assert_ne!(of("a c.img"), of("a b.img"));
    assert!(of("/").starts_with("disk-"));
    assert!(of("é.img").starts_with("__-"));
}

#[test]
fn wrong_usage_of_check_is_not_its_exit_code_for_corruption() {
    let code = |line: &str| {
        let arguments = arguments(line.split_whitespace().map(OsString::from));
        let error = Cli::try_parse_from(&arguments).expect_err(line);
        usage_exit_code(&error, &arguments)
    };
    assert_eq!(code("strata check --odd a"), 1);
    assert_eq!(code("strata --log-level debug check -r most a"), 1);
    assert_eq!(code("strata check --help"), 0);
    assert_eq!(code("strata info --odd check"), 2);
    assert_eq!(code("strata --odd"), 2);
    assert_eq!(code("strata-blk --odd check"), 2);
}
