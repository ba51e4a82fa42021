package main

import (
	"net"
	"os"
	"strconv"

	"nvstore.dev/cmd/internal/swtpmopt"
)

// A channel is where --ctrl or --server listens, or is connected already.
type channel struct {
	network, addr string // "unix" or "tcp"
	fd            int    // of a listening socket; -1 if there is none
	clientFD      int    // of a connection
	mode          os.FileMode
	uid, gid      int
	once          bool // close after each response
	terminate     bool // end with the connection
}

// parseChannel reads --ctrl, --server or --mssim.
func parseChannel(option, text string, known ...string) (*channel, error) {
	l, err := swtpmopt.Parse(option, text, append([]string{"type", "path", "port", "bindaddr", "mode", "uid", "gid"}, known...)...)
	if err != nil {
		return nil, err
	}
	c := &channel{fd: -1, clientFD: -1}
	if c.mode, err = l.Mode(0o600); err != nil {
		return nil, err
	}
	if c.uid, c.gid, err = l.Owner(); err != nil {
		return nil, err
	}
	if c.once, err = l.Flag("disconnect"); err != nil {
		return nil, err
	}
	if c.terminate, err = l.Flag("terminate"); err != nil {
		return nil, err
	}
	if c.fd, err = l.Number("fd", 1<<16); err != nil {
		return nil, err
	}
	if c.clientFD, err = l.Number("clientfd", 1<<16); err != nil {
		return nil, err
	}
	return c, c.place(option, l)
}

func (c *channel) place(option string, l *swtpmopt.List) error {
	port, err := l.Number("port", 65535)
	if err != nil {
		return err
	}
	ways := 0
	for _, b := range []bool{l.Has("path"), port >= 0, c.fd >= 0, c.clientFD >= 0} {
		if b {
			ways++
		}
	}
	switch typ := l.Get("type", "tcp"); {
	case ways != 1:
		return swtpmopt.Usagef("%s: one of path, port, fd and clientfd is wanted", option)
	case typ == "unixio" && port < 0:
		c.network, c.addr = "unix", l.Get("path", "")
	case typ == "tcp" && !l.Has("path"):
		c.network, c.addr = "tcp", net.JoinHostPort(l.Get("bindaddr", "127.0.0.1"), strconv.Itoa(max(port, 0)))
	default:
		return swtpmopt.Usagef("%s: type=%s; unixio has a path, tcp a port", option, typ)
	}
	return nil
}

// listen opens the channel. Its socket is only its owner's from the first
// moment on.
func (c *channel) listen() (net.Listener, error) {
	if c.fd >= 0 {
		f := os.NewFile(uintptr(c.fd), "socket")
		defer f.Close()
		return net.FileListener(f)
	}
	if c.network == "tcp" {
		return net.Listen("tcp", c.addr)
	}
	return listenUnix(c)
}

// connected returns the connection that was inherited.
func (c *channel) connected() (net.Conn, error) {
	f := os.NewFile(uintptr(c.clientFD), "socket")
	defer f.Close()
	return net.FileConn(f)
}

// startupType is that of --flags startup-…; swtpm's numbers, which are TPM
// 1.2's.
type startupType uint16

const (
	startupNone startupType = iota
	startupClear
	startupState
	startupDeactivated
)

type flagSet struct {
	noInit         bool // the TPM runs from the start
	startup        startupType
	noAutoShutdown bool
}

func parseFlags(text string) (flagSet, error) {
	l, err := swtpmopt.Parse("--flags", text, "not-need-init", "startup-none", "startup-clear", "startup-state",
		"startup-deactivated", "disable-auto-shutdown")
	if err != nil {
		return flagSet{}, err
	}
	f := flagSet{noInit: l.Has("not-need-init"), noAutoShutdown: l.Has("disable-auto-shutdown")}
	for name, typ := range map[string]startupType{"startup-clear": startupClear, "startup-state": startupState, "startup-deactivated": startupDeactivated} {
		if l.Has(name) {
			if f.startup != startupNone {
				return flagSet{}, swtpmopt.Usagef("--flags: one startup-… is enough")
			}
			f.startup, f.noInit = typ, true
		}
	}
	return f, nil
}
