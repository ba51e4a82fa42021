package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/cmd/internal/swtpmopt"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/crypto/secret"
	"nvstore.dev/tpmstate/control"
)

// options are those of "nvtpm socket".
type options struct {
	stdout, stderr io.Writer

	tpm2                       bool
	tpmstate, store            string
	live, qmp, export          string
	format, imageOpts          string
	passFile, keyFile          string
	passFD                     int
	key, migrationKey          string
	ctrl, server, mssim        string
	dataFD                     int
	port                       int
	flags, locality, migration string
	logTo, pid, seccomp        string
	profile                    string
	libtpms                    string
	sandbox, runAs             string
	printBox                   bool
	terminate, daemon          bool
	printCaps, printStates     bool
}

func (o *options) register(c *cobra.Command) {
	f := c.Flags()
	f.BoolVar(&o.tpm2, "tpm2", false, "be a TPM 2.0; without it, a TPM 1.2")
	f.StringVar(&o.store, "store", "", "`IMAGE` with the store that has the state")
	f.StringVarP(&o.format, "format", "F", "", "the image's `FORMAT`, qcow2 or raw; without it only images that nvtool made are opened")
	f.StringVar(&o.imageOpts, "image-opts", "", "a stack in QEMU's notation, in place of --store")
	f.StringVar(&o.live, "live", "", "`NBD-URI` of the store in the running QEMU that this TPM is for, such as nbd+unix:///nv?socket=PATH; --store or --image-opts says where it is while QEMU doesn't run")
	f.StringVar(&o.qmp, "qmp", "", "`SOCKET` of that QEMU's QMP, to know when it stops for a snapshot")
	f.StringVar(&o.export, "export", "", "have that QEMU export its `NODE` where --live says, through --qmp")
	f.StringVar(&o.passFile, "passphrase-file", "", "`FILE` with the store's passphrase; one newline at its end isn't part of it")
	f.IntVar(&o.passFD, "passphrase-fd", -1, "file descriptor `N` to read the store's passphrase from")
	f.StringVar(&o.keyFile, "key-file", "", "`FILE` with the store's raw key: 32 bytes, or 64 hexadecimal digits")
	f.StringVar(&o.tpmstate, "tpmstate", "", "where the state is: dir=DIR or backend-uri=dir://DIR, file://FILE, nvstore://IMAGE, or memory:// for none; mode=0640; lock, backup and fsync are accepted, as they are always so")
	f.StringVar(&o.key, "key", "", "key of swtpm's files: file=F|fd=N|pwdfile=F|pwdfd=N[,mode=aes-256-cbc][,format=hex|binary][,kdf=pbkdf2|sha512][,remove]")
	f.StringVar(&o.migrationKey, "migration-key", "", "key that state is wrapped in when it is handed out, as --key has it")
	f.StringVar(&o.ctrl, "ctrl", "", "control channel: type=unixio,path=F[,mode=0600][,uid=U][,gid=G] | type=tcp,port=N[,bindaddr=A] | fd=N | clientfd=N; terminate ends with the connection")
	f.StringVar(&o.server, "server", "", "data channel: as --ctrl; disconnect closes after each response")
	f.StringVar(&o.mssim, "mssim", "", "the Microsoft simulator's ports N and N+1: port=N[,bindaddr=A]")
	f.IntVarP(&o.port, "port", "p", -1, "data channel on TCP port `N` of 127.0.0.1")
	f.IntVarP(&o.dataFD, "fd", "f", -1, "data channel on a listening socket, file descriptor `N`")
	f.StringVar(&o.flags, "flags", "", "not-need-init, startup-clear|startup-state|startup-deactivated|startup-none, disable-auto-shutdown")
	f.StringVar(&o.locality, "locality", "", "reject-locality-4, allow-set-locality")
	f.StringVar(&o.migration, "migration", "", "incoming: don't open the state before it is needed; release-lock-outgoing: give it away with the save state; allow-plain: state may go and come in clear although the store is sealed")
	f.StringVar(&o.profile, "profile", "", "profile=JSON or file=F: the profile that a TPM 2.0 is manufactured with (libtpms 0.10)")
	f.StringVar(&o.logTo, "log", "", "file=F|fd=N[,level=N][,prefix=P][,truncate]; level 5 and above log every command")
	f.StringVar(&o.pid, "pid", "", "file=F|fd=N: where to write the process's number")
	f.StringVar(&o.seccomp, "seccomp", "", "action=none|log|kill (default kill): what a forbidden system call does")
	f.StringVar(&o.sandbox, "sandbox", "on", "on: as much as the kernel can; require: all of it, or end; off")
	f.StringVarP(&o.runAs, "runas", "r", "", "become `USER` before anything is opened")
	f.BoolVar(&o.printBox, "print-sandbox", false, "print what the sandbox has of these options, what it allows, and what it refuses, as JSON, and end")
	f.BoolVarP(&o.terminate, "terminate", "t", false, "end when the data channel's connection is lost")
	f.BoolVarP(&o.daemon, "daemon", "d", false, "go to the background once everything is open")
	f.BoolVar(&o.printCaps, "print-capabilities", false, "print what this program can do, as JSON, and end")
	f.BoolVar(&o.printStates, "print-states", false, "print which state there is, as JSON, and end")
	f.StringVar(&o.libtpms, "libtpms", "", "`FILE` of the library (default: libtpms.so.0)")
	c.MarkFlagsMutuallyExclusive("passphrase-file", "passphrase-fd", "key-file")
	c.MarkFlagsMutuallyExclusive("store", "tpmstate", "image-opts")
	c.MarkFlagsMutuallyExclusive("server", "port", "fd")
}

// credential reads the store's key. A descriptor is read once: the store may
// be opened again.
func (o *options) credential() func() (*keyslot.Credential, error) {
	var kept *secret.Secret
	raw := o.keyFile != ""
	return func() (*keyslot.Credential, error) {
		var err error
		switch {
		case kept != nil:
		case o.passFile != "":
			kept, err = secret.ReadFile(o.passFile)
		case raw:
			kept, err = secret.ReadKeyFile(o.keyFile)
		case o.passFD >= 0:
			kept, err = secret.ReadFD(o.passFD)
		default:
			return nil, nil
		}
		if err == nil {
			// Not earlier: after it, a file that is named through
			// /proc/self, as shells do with <(...), can't be opened.
			err = secret.Harden()
		}
		if err != nil {
			return nil, fmt.Errorf("reading the key: %w", err)
		}
		if raw {
			return keyslot.RawKey(kept.Bytes())
		}
		return keyslot.Passphrase(kept.Bytes())
	}
}

// source finds out where the state is.
func (o *options) source() (*source, error) {
	s := &source{tpm2: o.tpm2, format: o.format, cred: o.credential(), hasKey: o.passFile != "" || o.passFD >= 0 || o.keyFile != ""}
	switch {
	case o.store != "":
		s.location = o.store
	case o.imageOpts != "":
		s.location = o.imageOpts
	case o.tpmstate != "":
		l, err := swtpmopt.Parse("--tpmstate", o.tpmstate, "dir", "backend-uri", "mode", "lock", "backup", "fsync")
		if err != nil {
			return nil, err
		}
		if s.mode, err = l.Mode(0o640); err != nil {
			return nil, err
		}
		switch {
		case l.Has("dir") && !l.Has("backend-uri"):
			s.dir = strings.TrimPrefix(l.Get("dir", ""), "dir://")
		case l.Has("backend-uri"):
			if err := s.backendURI(l.Get("backend-uri", "")); err != nil {
				return nil, swtpmopt.Usagef("--tpmstate: %w", err)
			}
		default:
			return nil, swtpmopt.Usagef("--tpmstate: dir=DIR or backend-uri=URI is wanted")
		}
	default:
		return nil, swtpmopt.Usagef("--store IMAGE or --tpmstate says where the state is")
	}
	if o.key != "" && s.location != "" {
		return nil, swtpmopt.Usagef("--key is for swtpm's files; a store has --passphrase-file, --passphrase-fd or --key-file")
	}
	var err error
	s.key, err = swtpmopt.Key("--key", o.key)
	return s, err
}

// engine builds the TPM.
func (o *options) engine(log *logger) (*engine, *source, error) {
	src, err := o.source()
	if err != nil {
		return nil, nil, err
	}
	e := &engine{tpm2: o.tpm2, log: log}
	e.keys.File = src.key
	if e.keys.Migration, err = swtpmopt.Key("--migration-key", o.migrationKey); err != nil {
		return nil, nil, err
	}
	l, err := swtpmopt.Parse("--migration", o.migration, "incoming", "release-lock-outgoing", "allow-plain")
	if err != nil {
		return nil, nil, err
	}
	e.laterHome, e.releaseOnLeave, e.allowPlain = l.Has("incoming"), l.Has("release-lock-outgoing"), l.Has("allow-plain")
	if l, err = swtpmopt.Parse("--locality", o.locality, "reject-locality-4", "allow-set-locality"); err != nil {
		return nil, nil, err
	}
	e.refuseLoc4 = l.Has("reject-locality-4")
	if e.profile, err = readProfile(o.profile); err != nil {
		return nil, nil, err
	}
	e.openHome = src.open
	if src.behind, err = o.parseBehind(log); err != nil {
		return nil, nil, err
	}
	if src.behind != nil {
		if src.location == "" {
			return nil, nil, swtpmopt.Usagef("--live goes with --store IMAGE or --image-opts, where the store is before QEMU opens it")
		}
		// It can be made at once: what is to come later is its state.
		src.behind.later, e.laterHome = e.laterHome, false
		src.behind.moved = e.reload
	}
	if err := e.start(o.libtpms); err != nil {
		return nil, nil, err
	}
	src.writer = fmt.Sprintf("nvtpm %s, libtpms %s", programVersion(), e.lib.Version())
	return e, src, nil
}

func readProfile(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	l, err := swtpmopt.Parse("--profile", text, "profile", "file", "name")
	if err != nil {
		return "", err
	}
	switch {
	case l.Has("profile"):
		return l.Get("profile", ""), nil
	case l.Has("name"):
		return fmt.Sprintf(`{"Name":%q}`, l.Get("name", "")), nil
	case l.Has("file"):
		p, err := os.ReadFile(l.Get("file", ""))
		return string(p), err
	}
	return "", swtpmopt.Usagef("--profile: name, profile or file is wanted")
}

// run serves until it is told to end.
func (o *options) run(ctx context.Context) error {
	log, err := o.logger()
	if err != nil {
		return err
	}
	if o.daemon && !o.printCaps && !o.printStates {
		if done, err := daemonize(); done || err != nil {
			return err
		}
	}
	if o.printCaps {
		return o.capabilities(log)
	}
	flags, err := parseFlags(o.flags)
	if err != nil {
		return err
	}
	box, err := o.confine(log)
	if err != nil {
		return err
	}
	defer o.removePID()
	e, src, err := o.engine(log)
	if err != nil {
		return err
	}
	if o.printBox {
		if err := o.filter(box); err != nil {
			return err
		}
		return o.printSandbox(box)
	}
	if o.printStates {
		return o.states(src)
	}
	e.autoShutdown = !flags.noAutoShutdown
	// Before there are sockets: who waits for those may start a QEMU, which
	// wants the image.
	if !e.laterHome {
		if _, err := e.storage(); err != nil {
			return err
		}
	}
	s, err := o.open(e, log)
	if err != nil {
		return errors.Join(err, e.release())
	}
	defer s.close()
	if flags.noInit {
		if r := e.Start(false); r != control.Success {
			return fmt.Errorf("the TPM doesn't start with the state in %s: result %#x; see the log", src, uint32(r))
		}
	}
	if flags.startup != startupNone {
		if err := e.startup(flags.startup); err != nil {
			return err
		}
	}
	if err := o.filter(box); err != nil {
		return err
	}
	if err := o.writePID(); err != nil {
		return err
	}
	if err := ready(); err != nil {
		return err
	}
	log.infof("sandbox: %s", box)
	log.infof("serving a TPM %s, state in %s, libtpms %s", versionOf(o.tpm2), src, e.lib.Version())
	err = s.serve(ctx)
	return errors.Join(err, s.close(), e.close())
}

func (o *options) logger() (*logger, error) {
	l := &logger{w: o.stderr, prefix: "nvtpm: "}
	if o.logTo == "" {
		return l, nil
	}
	v, err := swtpmopt.Parse("--log", o.logTo, "file", "fd", "level", "prefix", "truncate")
	if err != nil {
		return nil, err
	}
	if l.level, err = v.Number("level", 100); err != nil {
		return nil, err
	}
	l.level = max(l.level, 1)
	l.prefix = v.Get("prefix", "")
	fd, err := v.Number("fd", 1<<16)
	switch {
	case err != nil:
		return nil, err
	case fd >= 0:
		l.w, l.stamp = os.NewFile(uintptr(fd), "log"), true
	case v.Get("file", "-") == "-":
		l.w = nil
	default:
		mode := os.O_APPEND
		if trunc, err := v.Flag("truncate"); err != nil {
			return nil, err
		} else if trunc {
			mode = os.O_TRUNC
		}
		if l.w, err = os.OpenFile(v.Get("file", ""), os.O_WRONLY|os.O_CREATE|mode, 0o640); err != nil {
			return nil, err
		}
		l.stamp = true
	}
	return l, nil
}

func (o *options) writePID() error {
	if o.pid == "" {
		return nil
	}
	l, err := swtpmopt.Parse("--pid", o.pid, "file", "fd")
	if err != nil {
		return err
	}
	line := strconv.Itoa(os.Getpid()) + "\n"
	fd, err := l.Number("fd", 1<<16)
	switch {
	case err != nil:
		return err
	case fd >= 0:
		f := os.NewFile(uintptr(fd), "pid")
		_, err := f.WriteString(line)
		return errors.Join(err, f.Close())
	case l.Has("file"):
		path := l.Get("file", "")
		if err := os.Rename(path+pidNew, path); err == nil {
			return nil
		}
		return os.WriteFile(path, []byte(line), 0o640) // there is no sandbox
	}
	return swtpmopt.Usagef("--pid: file or fd is wanted")
}

// removePID takes the file away that names a process which is gone.
func (o *options) removePID() {
	if l, err := swtpmopt.Parse("--pid", o.pid, "file", "fd"); err == nil && l.Has("file") {
		os.Remove(l.Get("file", ""))
		os.Remove(l.Get("file", "") + pidNew)
	}
}

// A service has the channels.
type service struct {
	e         *engine
	log       *logger
	data      *dataChannel
	sim       *simulator
	listeners []net.Listener
	start     []func()
	paths     []string // sockets to remove
	ended     chan error
	closed    bool
	ctrlConns *conns
}

// open makes all channels, so that errors are the caller's.
func (o *options) open(e *engine, log *logger) (*service, error) {
	s := &service{e: e, log: log, ended: make(chan error, 16), ctrlConns: &conns{}}
	s.data = &dataChannel{e: e}
	if o.terminate {
		s.data.end = func() { s.end(nil) }
	}
	e.onData = s.data.adopt
	s.sim = &simulator{e: e, stop: func() { s.end(nil) }}
	for _, fn := range []func(*service) error{o.openServer, o.openCtrl, o.openSim} {
		if err := fn(s); err != nil {
			return nil, errors.Join(err, s.close())
		}
	}
	if len(s.start) == 0 {
		return nil, swtpmopt.Usagef("nothing to serve on: give --ctrl, --server or --mssim")
	}
	return s, nil
}

func (o *options) openServer(s *service) error {
	text := o.server
	switch {
	case o.port >= 0:
		text = "type=tcp,port=" + strconv.Itoa(o.port)
	case o.dataFD >= 0:
		text = "fd=" + strconv.Itoa(o.dataFD)
	case text == "":
		return nil
	}
	c, err := parseChannel("--server", text, "fd", "disconnect")
	if err != nil {
		return err
	}
	s.data.once = c.once
	return s.listen(c, s.data.accept)
}

func (o *options) openCtrl(s *service) error {
	if o.ctrl == "" {
		return nil
	}
	c, err := parseChannel("--ctrl", o.ctrl, "fd", "clientfd", "terminate")
	if err != nil {
		return err
	}
	srv := &control.Server{TPM: s.e, TPM2: o.tpm2, Log: func(c control.Command, r control.Result) {
		s.log.debugf("control channel: %v: result %#x", c, uint32(r))
	}}
	handle := func(conn net.Conn) {
		s.ctrlConns.set(conn)
		err := srv.Serve(conn)
		s.ctrlConns.set(nil)
		switch {
		case errors.Is(err, control.ErrShutdown):
			s.end(nil)
		case err != nil:
			s.log.printf("control channel: %v", err)
		}
		if c.terminate {
			s.end(nil)
		}
	}
	if c.clientFD >= 0 {
		conn, err := c.connected()
		if err != nil {
			return fmt.Errorf("--ctrl: %w", err)
		}
		s.start = append(s.start, func() { handle(conn); s.end(nil) })
		return nil
	}
	return s.listen(c, func(l net.Listener) {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			handle(conn)
		}
	})
}

// simAddress is where the simulator's first port is; -1 is nowhere.
func (o *options) simAddress() (host string, port int, err error) {
	if o.mssim == "" {
		return "", -1, nil
	}
	l, err := swtpmopt.Parse("--mssim", o.mssim, "port", "bindaddr")
	if err != nil {
		return "", -1, err
	}
	if port, err = l.Number("port", 65534); err == nil && port < 0 {
		err = swtpmopt.Usagef("--mssim: port is wanted")
	}
	return l.Get("bindaddr", "127.0.0.1"), port, err
}

func (o *options) openSim(s *service) error {
	host, port, err := o.simAddress()
	if err != nil || port < 0 {
		return err
	}
	for i, handle := range []func(net.Conn) error{s.sim.commands, s.sim.platform} {
		c := &channel{network: "tcp", addr: net.JoinHostPort(host, strconv.Itoa(port+i)), fd: -1}
		if err := s.listen(c, func(l net.Listener) { s.sim.serve(l, handle) }); err != nil {
			return err
		}
	}
	return nil
}

func (s *service) listen(c *channel, accept func(net.Listener)) error {
	l, err := c.listen()
	if err != nil {
		return err
	}
	s.listeners = append(s.listeners, l)
	s.start = append(s.start, func() { accept(l) })
	return nil
}

func (s *service) end(err error) {
	select {
	case s.ended <- err:
	default: // it ends already
	}
}

func (s *service) serve(ctx context.Context) error {
	for _, fn := range s.start {
		go fn()
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-s.ended:
		return err
	}
}

// close takes the channels away, and waits for the command that runs.
func (s *service) close() error {
	if s.closed {
		return nil
	}
	s.closed = true
	for _, l := range s.listeners {
		l.Close() // removes a unix socket's file
	}
	s.ctrlConns.close()
	s.sim.close()
	s.data.close()
	return nil
}
