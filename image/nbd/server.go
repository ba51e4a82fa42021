package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"nvstore.dev/image"
	"nvstore.dev/image/nbd/internal/tlspsk"
)

// ServerOptions for NewServer. Nil is the zero value: no TLS, and the limits
// below.
type ServerOptions struct {
	// TLS, if not nil, is demanded of every client before it learns
	// anything (FORCEDTLS). See ServerTLS.
	TLS *tls.Config

	// PSKs, if not nil, are the keys of which every client must have one.
	// TLS 1.3 by them is demanded in place of TLS by certificates. Of two
	// for one identity, the first counts.
	PSKs []*PSK

	// MaxConnections at once; more are hung up on. 0 is 64.
	MaxConnections int

	// HandshakeTimeout bounds the handshake; 0 is 10 s.
	HandshakeTimeout time.Duration

	// StallTimeout is how long a client may leave a request half sent, or
	// replies unread; 0 is 60 s.
	StallTimeout time.Duration

	// IdleTimeout is how long a client may ask for nothing; 0 is for ever.
	// Few clients connect again by themselves.
	IdleTimeout time.Duration

	// Report, if not nil, is told what went wrong with a connection, and of
	// errors of Devices, which clients learn the kind of only. It is called
	// by many goroutines.
	Report func(peer string, err error)
}

// An Export is a Device under a name.
type Export struct {
	Name        string // at most 4096 bytes; a client that names none gets "", or the only export
	Description string // for people
	Device      image.Device
	ReadOnly    bool

	// MinBlock, PreferredBlock and MaxPayload are the block size
	// constraints, bytes; 0 is 1, 4096 and 32 MiB. The first two are powers
	// of 2, MinBlock at most 65536.
	MinBlock, PreferredBlock, MaxPayload int
}

// A Server exports Devices. The Devices stay their owner's: the server doesn't
// close them.
type Server struct {
	opts  ServerOptions
	keys  map[string][]byte // of opts.PSKs
	large chan struct{}     // tokens for replies over pieceSize

	mu        sync.Mutex
	exports   map[string]*export
	listeners map[net.Listener]struct{}
	sessions  map[*session]struct{}
	closing   bool
	running   sync.WaitGroup
}

// An export is an Export with what its connections share.
type export struct {
	Export
	size    int64
	flusher flusher
}

// NewServer returns a server without exports.
func NewServer(o *ServerOptions) *Server {
	s := &Server{exports: make(map[string]*export), listeners: make(map[net.Listener]struct{}),
		sessions: make(map[*session]struct{}), large: make(chan struct{}, 4)}
	if o != nil {
		s.opts = *o
	}
	if s.opts.PSKs != nil {
		s.keys = make(map[string][]byte)
		for _, k := range slices.Backward(s.opts.PSKs) {
			s.keys[k.identity] = k.key
		}
	}
	if s.opts.MaxConnections <= 0 {
		s.opts.MaxConnections = 64
	}
	if s.opts.HandshakeTimeout <= 0 {
		s.opts.HandshakeTimeout = 10 * time.Second
	}
	if s.opts.StallTimeout <= 0 {
		s.opts.StallTimeout = 60 * time.Second
	}
	return s
}

// secure returns what puts TLS over a connection, or nil if there is none.
func (s *Server) secure() func(net.Conn) tlsConn {
	switch {
	case s.keys != nil:
		return func(nc net.Conn) tlsConn { return tlspsk.Server(nc, s.keys) }
	case s.opts.TLS != nil:
		return func(nc net.Conn) tlsConn { return tls.Server(nc, s.opts.TLS) }
	}
	return nil
}

// Add offers an export to clients that connect from now on. Its size is what
// the Device has now. A name that is taken fails with image.ErrExist, sizes
// that make no sense with image.ErrOutOfRange.
func (s *Server) Add(e *Export) error {
	x := &export{Export: *e, size: e.Device.Size()}
	if x.MinBlock == 0 {
		x.MinBlock = 1
	}
	if x.PreferredBlock == 0 {
		x.PreferredBlock = max(4096, x.MinBlock)
	}
	if x.MaxPayload == 0 {
		x.MaxPayload = maxPayload
	}
	switch {
	case x.MinBlock < 1 || x.MinBlock > maxMinBlock || x.MinBlock&(x.MinBlock-1) != 0,
		x.PreferredBlock < max(512, x.MinBlock) || x.PreferredBlock&(x.PreferredBlock-1) != 0 || x.PreferredBlock > maxPayload,
		x.MaxPayload < x.PreferredBlock || x.MaxPayload > maxPayload:
		return fmt.Errorf("nbd: block sizes %d, %d and %d: %w", x.MinBlock, x.PreferredBlock, x.MaxPayload, image.ErrOutOfRange)
	case len(x.Name) > maxString || len(x.Description) > maxString || strings.ContainsRune(x.Name, 0):
		return fmt.Errorf("nbd: export %.32q: a name or description over 4096 bytes, or with NUL: %w", x.Name, image.ErrOutOfRange)
	}
	x.size &^= int64(x.MinBlock) - 1
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exports[x.Name] != nil {
		return fmt.Errorf("nbd: export %q: %w", x.Name, image.ErrExist)
	}
	s.exports[x.Name] = x
	return nil
}

// Remove takes an export back, hangs up on its clients, and returns when
// nothing uses its Device any more.
func (s *Server) Remove(name string) error {
	s.mu.Lock()
	x := s.exports[name]
	delete(s.exports, name)
	var users []*session
	for c := range s.sessions {
		if c.export == x {
			users = append(users, c)
		}
	}
	s.mu.Unlock()
	if x == nil {
		return fmt.Errorf("nbd: export %q: %w", name, image.ErrNotFound)
	}
	for _, c := range users {
		c.drain()
	}
	for _, c := range users {
		<-c.ended
	}
	return nil
}

// find returns the export that a client names. The empty name is the default
// export's: the one of that name, or the only one.
func (s *Server) find(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.exports[name]
	if x == nil && name == "" && len(s.exports) == 1 {
		for _, x = range s.exports {
			break
		}
	}
	return x
}

// list returns the exports by name.
func (s *Server) list() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*export
	for _, x := range s.exports {
		all = append(all, x)
	}
	slices.SortFunc(all, func(a, b *export) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// Serve accepts connections until Shutdown or Close, and then returns nil. The
// listener is closed.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return errors.Join(image.ErrClosed, l.Close())
	}
	s.listeners[l] = struct{}{}
	s.running.Add(1)
	s.mu.Unlock()
	defer s.running.Done()
	defer func() {
		_ = l.Close()
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	for wait := time.Duration(0); ; {
		nc, err := l.Accept()
		if err == nil {
			wait = 0
			s.accept(nc)
			continue
		}
		s.mu.Lock()
		closing := s.closing
		s.mu.Unlock()
		if closing {
			return nil
		}
		if ne := net.Error(nil); !errors.As(err, &ne) || errors.Is(err, net.ErrClosed) {
			return err
		}
		// Out of descriptors, or a client that went at once.
		s.report(l.Addr().String(), err)
		wait = min(max(2*wait, 5*time.Millisecond), time.Second)
		time.Sleep(wait)
	}
}

// accept begins a session, if there is room.
func (s *Server) accept(nc net.Conn) {
	s.mu.Lock()
	full := len(s.sessions) >= s.opts.MaxConnections
	if full || s.closing {
		s.mu.Unlock()
		if full {
			s.report(peerName(nc), fmt.Errorf("nbd: turned away: %d connections are open", s.opts.MaxConnections))
		}
		_ = nc.Close()
		return
	}
	c := newSession(s, nc)
	s.sessions[c] = struct{}{}
	s.running.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.running.Done()
		err := c.run()
		s.mu.Lock()
		delete(s.sessions, c)
		s.mu.Unlock()
		close(c.ended)
		if err != nil {
			s.report(c.peer, err)
		}
	}()
}

func (s *Server) report(peer string, err error) {
	if s.opts.Report != nil {
		s.opts.Report(peer, err)
	}
}

// Connections returns how many clients there are.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions)
}

// Shutdown stops accepting, answers the requests that have arrived, and hangs
// up. If ctx ends before that, connections are cut. It returns when nothing
// uses the Devices any more, which it doesn't sync.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closing = true
	for l := range s.listeners {
		_ = l.Close()
	}
	for c := range s.sessions {
		c.drain()
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.running.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for c := range s.sessions {
		c.fail(context.Cause(ctx))
	}
	s.mu.Unlock()
	<-done
	return context.Cause(ctx)
}

// Close cuts all connections. It returns when nothing uses the Devices any
// more.
func (s *Server) Close() error {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = s.Shutdown(ctx)
	return nil
}
