package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/crypto/secret"
	"nvstore.dev/image"
	"nvstore.dev/image/nbd"
	"nvstore.dev/nvstore"
)

type serveNBD struct {
	daemon
	ref imageRef
	key keyFlags

	blobs, create, resize []string
	all, device           bool
	export                string
	sockets, listen       []string
	readOnly              bool
	certDir               string
	verifyPeer            bool
	pskFile               string
	maxConnections        int
	idle, handshake       time.Duration
	minBlock              size

	users []*nbd.PSK
	store *nvstore.Store
	dev   image.Device
	names []string
}

func (a *app) serveNBDCmd() *cobra.Command {
	o := &serveNBD{daemon: daemon{app: a}}
	c := a.verb("nbd IMAGE (--blob NAME... | --all | --device) (--socket PATH | --listen ADDR)",
		"Export blobs, or the image itself, over NBD", o.run)
	c.Long = `Export blobs by their names, or with --device the content of the image, until
SIGTERM or SIGINT. A client's FLUSH is one commit of the store; FLUSHes that
come together, of one blob or of several, share one. What a client wrote and
didn't flush is committed when the server stops.

The URIs are printed when clients can connect; --json prints one object. If
systemd passes sockets (LISTEN_FDS), they are used beside those given.`
	c.Example = `  nvtool serve nbd vm.qcow2 --blob uefi/vars --socket /run/vm/nbd.sock
  qemu-system-x86_64 ... -blockdev driver=nbd,node-name=vars,server.type=unix,server.path=/run/vm/nbd.sock,export=uefi/vars
  nbdinfo --list 'nbd+unix://?socket=/run/vm/nbd.sock'`
	o.ref.flags(c)
	o.key.flags(c, "the ")
	f := c.Flags()
	f.StringArrayVar(&o.blobs, "blob", nil, "export the blob `NAME`; may be given often")
	f.BoolVar(&o.all, "all", false, "export all blobs that there are")
	f.BoolVar(&o.device, "device", false, "export the image's content, store or not")
	f.StringVar(&o.export, "export", "", "`NAME` of the export with --device; empty is the default export")
	f.StringArrayVar(&o.create, "create", nil, "make the blob `NAME=SIZE` if it isn't there, and export it")
	f.StringArrayVar(&o.resize, "resize", nil, "first give the blob `NAME=SIZE` another size")
	f.StringArrayVar(&o.sockets, "socket", nil, "listen on a unix socket at `PATH`, for its owner only")
	f.StringArrayVar(&o.listen, "listen", nil, "listen on TCP at `HOST:PORT`")
	f.BoolVarP(&o.readOnly, "read-only", "r", false, "let clients only read, and open the image so")
	f.StringVar(&o.certDir, "tls-certificates", "", "demand TLS, with server-cert.pem and server-key.pem in `DIR`")
	f.BoolVar(&o.verifyPeer, "tls-verify-peer", false, "demand certificates of clients, signed by DIR's ca-cert.pem")
	f.StringVar(&o.pskFile, "tls-psk", "", "demand TLS 1.3 by one of the pre-shared keys in `FILE`, whose lines are USER:HEXKEY, as psktool makes them")
	f.IntVar(&o.maxConnections, "max-connections", 64, "clients at once, at most `N`")
	f.DurationVar(&o.idle, "idle-timeout", 0, "hang up on clients that ask for nothing for this long; 0 is never")
	f.DurationVar(&o.handshake, "handshake-timeout", 10*time.Second, "hang up on clients that take longer to choose an export")
	f.Var(&o.minBlock, "min-block", "have clients ask for multiples of `SIZE`, a power of 2 up to 64k")
	f.StringVar(&o.pidFile, "pid-file", "", "write the process ID to `FILE` when clients can connect")
	return c
}

func (o *serveNBD) run(ctx context.Context, args []string) (err error) {
	if err := o.check(args); err != nil {
		return err
	}
	opts := &nbd.ServerOptions{MaxConnections: o.maxConnections, IdleTimeout: o.idle, HandshakeTimeout: o.handshake, Report: o.complain}
	if err := o.secure(opts); err != nil {
		return err
	}
	server := nbd.NewServer(opts)
	exports, err := o.exports(ctx)
	defer func() { err = errors.Join(err, o.close(exports)) }()
	if err == nil && o.pskFile != "" {
		err = secret.Harden()
	}
	if err != nil {
		return o.explain(&o.ref, err)
	}
	for _, e := range exports {
		e.ReadOnly, e.MinBlock = o.readOnly, int(o.minBlock)
		if err := server.Add(e); err != nil {
			return err
		}
		o.names = append(o.names, e.Name)
	}
	listeners, err := o.bind()
	if err != nil {
		return err
	}
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { failed <- server.Serve(l) }()
	}
	if err := o.announce(listeners); err != nil {
		return errors.Join(err, server.Close())
	}
	undo, err := o.ready()
	if err != nil {
		return errors.Join(err, server.Close())
	}
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	const patience = 10 * time.Second
	stop, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if late := server.Shutdown(stop); late != nil {
		o.warnf("clients that took too long were cut off")
	}
	return errors.Join(err, undo())
}

// secure reads what TLS is by.
func (o *serveNBD) secure(opts *nbd.ServerOptions) (err error) {
	switch {
	case o.certDir != "":
		opts.TLS, err = nbd.ServerTLS(o.certDir, o.verifyPeer)
	case o.pskFile != "":
		o.warnExposed(o.pskFile)
		if o.users, err = nbd.ReadPSKs(o.pskFile); errors.Is(err, nbd.ErrKey) {
			err = withHint(err, "psktool -u USER -p FILE makes keys, or: (umask 077; echo USER:$(openssl rand -hex 32) >> FILE)")
		}
		opts.PSKs = o.users
	}
	return err
}

func (o *serveNBD) check(args []string) error {
	if _, err := o.ref.take(args, 0, 0, ""); err != nil {
		return err
	}
	ways := 0
	for _, on := range []bool{o.all, o.device, len(o.blobs)+len(o.create) > 0} {
		if on {
			ways++
		}
	}
	switch {
	case ways != 1:
		return usagef("what to export: --blob or --create, or --all, or --device")
	case len(o.sockets)+len(o.listen) == 0 && os.Getenv("LISTEN_FDS") == "":
		return usagef("where to listen: --socket PATH or --listen HOST:PORT")
	case o.readOnly && len(o.create)+len(o.resize) > 0:
		return usagef("--create and --resize change the store, and it is opened --read-only")
	case o.device && len(o.resize) > 0:
		return usagef("--resize is for blobs, and --device exports the image")
	case o.export != "" && !o.device:
		return usagef("--export names what --device exports; blobs have names")
	case o.verifyPeer && o.certDir == "":
		return usagef("--tls-verify-peer needs --tls-certificates")
	case o.pskFile != "" && o.certDir != "":
		return usagef("--tls-psk and --tls-certificates: TLS is by either")
	case o.maxConnections < 1 || o.maxConnections > 1<<16:
		return invalidf("--max-connections %d: 1 to 65536", o.maxConnections)
	case o.minBlock != 0 && (o.minBlock > 64<<10 || o.minBlock&(o.minBlock-1) != 0):
		return invalidf("--min-block %d: a power of 2 up to 64k", int64(o.minBlock))
	case o.idle < 0 || o.handshake <= 0:
		return invalidf("a timeout below 0")
	}
	return nil
}

// exports opens what is to be exported. Also with an error, close closes it.
func (o *serveNBD) exports(ctx context.Context) (list []*nbd.Export, err error) {
	if o.device {
		if err := o.ref.secrets.load(ctx, o.app, &o.ref); err != nil {
			return nil, err
		}
		defer o.ref.secrets.wipe()
		if o.dev, err = o.app.device(&o.ref, o.readOnly); err != nil {
			return nil, err
		}
		return []*nbd.Export{{Name: o.export, Description: formatOf(o.dev) + " image", Device: o.dev}}, nil
	}
	create, err := parseSized(o.create)
	if err != nil {
		return nil, err
	}
	resize, err := parseSized(o.resize)
	if err != nil {
		return nil, err
	}
	names, err := canonical(o.blobs)
	if err != nil {
		return nil, err
	}
	acc := serving
	if o.readOnly {
		acc = reading
	}
	if o.store, err = o.open(ctx, &o.ref, &o.key, acc); err != nil {
		return nil, err
	}
	if err := o.makeBlobs(o.store, create, resize); err != nil {
		return nil, err
	}
	for _, c := range create {
		names = append(names, c.name)
	}
	if o.all {
		entries, err := o.store.List("")
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if e.Attached {
				o.warnf("%s is attached and isn't exported: an emulator may have it open", printable(e.Name))
				continue
			}
			names = append(names, e.Name)
		}
		if len(names) == 0 {
			return nil, withHint(fmt.Errorf("%w: the store is empty", nvstore.ErrNotFound), "--create NAME=SIZE makes a blob")
		}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		b, err := o.store.Blob(name, nil)
		if err != nil {
			return list, err
		}
		e, err := o.store.Stat(name)
		if err != nil {
			return list, errors.Join(err, b.Close())
		}
		list = append(list, &nbd.Export{Name: name, Description: printable(e.Type), Device: b.Device()})
	}
	return list, nil
}

// close commits what wasn't flushed, and closes everything.
func (o *serveNBD) close(list []*nbd.Export) (err error) {
	for _, e := range list {
		if !o.readOnly {
			err = errors.Join(err, e.Device.Sync())
		}
		if o.dev == nil {
			// With a revert underneath there is nothing left to close.
			err = errors.Join(err, e.Device.Close())
		}
	}
	if o.store != nil {
		err = errors.Join(err, o.store.Close())
	}
	if o.dev != nil {
		err = errors.Join(err, o.dev.Close())
	}
	return err
}

// bind makes the sockets, all or none.
func (o *serveNBD) bind() (list []net.Listener, err error) {
	defer func() {
		if err != nil {
			for _, l := range list {
				_ = l.Close()
			}
			list = nil
		}
	}()
	if list, err = inherited(); err != nil {
		return list, err
	}
	for _, path := range o.sockets {
		l, err := nbd.Listen("unix", path)
		if err != nil {
			return list, withHint(err, "another server may be running; or give another path")
		}
		list = append(list, l)
	}
	for _, addr := range o.listen {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			addr = net.JoinHostPort(addr, nbd.DefaultPort)
		}
		l, err := nbd.Listen("tcp", addr)
		if err != nil {
			return list, err
		}
		list = append(list, l)
		if ip, ok := l.Addr().(*net.TCPAddr); ok && !ip.IP.IsLoopback() && o.certDir+o.pskFile == "" {
			o.warnf("%s can be reached from other machines, and whoever reaches it reads and writes: give --tls-psk or --tls-certificates", addr)
		}
	}
	return list, nil
}

// announce prints the URIs.
func (o *serveNBD) announce(listeners []net.Listener) error {
	type served struct {
		Exports []string `json:"exports"`
		URIs    []string `json:"uris"`
		PID     int      `json:"pid"`
	}
	s := served{Exports: o.names, PID: os.Getpid()}
	for _, l := range listeners {
		a := l.Addr()
		for _, name := range o.names {
			t := nbd.Target{Network: a.Network(), Address: a.String(), Export: name, TLS: o.certDir+o.pskFile != "", PSKFile: o.pskFile}
			if len(o.users) == 1 {
				t.Username = o.users[0].Identity()
			}
			s.URIs = append(s.URIs, t.String())
		}
	}
	if o.json {
		return o.printJSON(s)
	}
	for _, uri := range s.URIs {
		o.sayf("%s", uri)
	}
	return nil
}
