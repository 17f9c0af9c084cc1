// A member of the cluster: a process. The others reach it through a bridge of the test's process,
// which can cut it off; clients do if the test asks for it (UseBridge). As cluster.go, this has the
// names, and parts, of etcd's tests/integration/cluster.go: Copyright 2016 The etcd Authors, Apache
// License 2.0.

package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/testutil"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/config"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 10 * time.Second
)

var latestPort int32 = 21000

type member struct {
	config.ServerConfig
	PeerTLSInfo   *transport.TLSInfo
	ClientTLSInfo *transport.TLSInfo
	DialOptions   []grpc.DialOption

	cfg        ClusterConfig
	cluster    *cluster
	s          *process
	isLearner  bool
	grpcBridge *bridge
	peerBridge *bridge
	peerListen string // The address behind peerBridge, which is at PeerURLs.
	useBridge  bool
	grpcURL    string // For clients.

	mu  sync.Mutex
	cut map[*member]bool // Those that it cannot reach, nor they it.

	// serverClient reaches the member without the bridge.
	serverClient         *clientv3.Client
	keepDataDirTerminate bool
}

type memberConfig struct {
	name      string
	useBridge bool
	ClusterConfig
}

func mustNewMember(t testutil.TB, mcfg memberConfig) *member {
	m := &member{
		cfg:           mcfg.ClusterConfig,
		PeerTLSInfo:   mcfg.PeerTLS,
		ClientTLSInfo: mcfg.ClientTLS,
		useBridge:     mcfg.useBridge || mcfg.UseBridge,
		peerListen:    freeAddress(t),
		cut:           map[*member]bool{},
	}
	m.Name = mcfg.name
	m.PeerURLs = types.MustNewURLs([]string{scheme(m.PeerTLSInfo) + freeAddress(t)})
	m.ClientURLs = types.MustNewURLs([]string{scheme(m.ClientTLSInfo) + freeAddress(t)})
	m.DataDir = filepath.Join(t.TempDir(), "etcd")
	m.InitialPeerURLsMap = types.URLsMap{m.Name: m.PeerURLs}
	m.NewCluster = true
	m.ElectionTicks = electionTicks
	m.TickMs = uint(tickDuration / time.Millisecond)
	m.QuotaBackendBytes = mcfg.QuotaBackendBytes
	m.SnapshotCount = mcfg.SnapshotCount
	if m.SnapshotCount == 0 {
		m.SnapshotCount = etcdserver.DefaultSnapshotCount
	}
	m.MaxTxnOps = mcfg.MaxTxnOps
	if m.MaxTxnOps == 0 {
		m.MaxTxnOps = embed.DefaultMaxTxnOps
	}
	m.MaxRequestBytes = mcfg.MaxRequestBytes
	if m.MaxRequestBytes == 0 {
		m.MaxRequestBytes = embed.DefaultMaxRequestBytes
	}
	m.AuthToken = mcfg.AuthToken
	if m.AuthToken == "" {
		m.AuthToken = "simple"
	}
	m.Logger = zap.NewNop()
	switch {
	case !m.useBridge:
		m.grpcURL = m.directURL()
	case m.ClientTLSInfo != nil:
		m.grpcURL = "unixs://" + m.bridgeAddress()
	default:
		m.grpcURL = "unix://" + m.bridgeAddress()
	}
	return m
}

func scheme(info *transport.TLSInfo) string {
	if info != nil {
		return "https://"
	}
	return "http://"
}

// freeAddress takes ports in order, below those that the system gives to connections.
func freeAddress(t testutil.TB) string {
	for {
		address := fmt.Sprintf("127.0.0.1:%d", atomic.AddInt32(&latestPort, 1))
		if l, err := net.Listen("tcp", address); err == nil {
			l.Close()
			return address
		}
	}
}

// Clone returns a member with the same configuration and URLs. It listens elsewhere, since both may
// run at once.
func (m *member) Clone(t testutil.TB) *member {
	other := mustNewMember(t, memberConfig{name: m.Name, ClusterConfig: m.cfg})
	other.PeerURLs = m.PeerURLs
	other.InitialPeerURLsMap = m.InitialPeerURLsMap
	return other
}

func (m *member) ID() types.ID { return m.s.ID() }

func (m *member) URL() string { return m.ClientURLs[0].String() }

func (m *member) GRPCURL() string { return m.grpcURL }

// directURL names the host as the certificate does.
func (m *member) directURL() string {
	if m.cfg.UseIP {
		return m.URL()
	}
	return strings.Replace(m.URL(), "127.0.0.1", "localhost", 1)
}

func (m *member) bridgeAddress() string { return "localhost:" + m.Name }

func (m *member) Bridge() *bridge { return m.grpcBridge }

func (m *member) ElectionTimeout() time.Duration {
	return time.Duration(m.ElectionTicks*int(m.TickMs)) * time.Millisecond
}

// NewClientV3 connects to the member.
func NewClientV3(m *member) (*clientv3.Client, error) {
	return m.connect(m.GRPCURL(), m.DialOptions)
}

func (m *member) connect(url string, options []grpc.DialOption) (*clientv3.Client, error) {
	cfg := clientv3.Config{
		Endpoints:          []string{url},
		DialTimeout:        5 * time.Second,
		DialOptions:        append([]grpc.DialOption{grpc.WithBlock()}, options...),
		MaxCallSendMsgSize: m.cfg.ClientMaxCallSendMsgSize,
		MaxCallRecvMsgSize: m.cfg.ClientMaxCallRecvMsgSize,
	}
	if m.ClientTLSInfo != nil {
		config, err := m.ClientTLSInfo.ClientConfig()
		if err != nil {
			return nil, err
		}
		cfg.TLS = config
	}
	return newClientV3(cfg, m.Logger)
}

func (m *member) flags() []string {
	state := "existing"
	if m.NewCluster {
		state = "new"
	}
	flags := []string{
		"--name", m.Name,
		"--data-dir", m.DataDir,
		"--listen-client-urls", m.URL(),
		"--advertise-client-urls", m.URL(),
		"--listen-peer-urls", scheme(m.PeerTLSInfo) + m.peerListen,
		"--initial-advertise-peer-urls", m.PeerURLs.String(),
		"--initial-cluster-state", state,
		"--initial-cluster-token", "etcd",
		"--heartbeat-interval", fmt.Sprint(m.TickMs),
		"--election-timeout", fmt.Sprint(m.TickMs * uint(m.ElectionTicks)),
		"--snapshot-count", fmt.Sprint(m.SnapshotCount),
		"--max-txn-ops", fmt.Sprint(m.MaxTxnOps),
		"--max-request-bytes", fmt.Sprint(m.MaxRequestBytes),
		"--quota-backend-bytes", fmt.Sprint(m.QuotaBackendBytes),
		"--auth-token", m.AuthToken,
		"--bcrypt-cost", "4",
		"--experimental-initial-corrupt-check",
		fmt.Sprintf("--strict-reconfig-check=%t", m.StrictReconfigCheck),
		fmt.Sprintf("--force-new-cluster=%t", m.ForceNewCluster),
		fmt.Sprintf("--experimental-enable-lease-checkpoint=%t", m.cfg.EnableLeaseCheckpoint),
		fmt.Sprintf("--experimental-enable-lease-checkpoint-persist=%t", m.cfg.LeaseCheckpointPersist),
	}
	if m.cfg.DiscoveryURL != "" {
		flags = append(flags, "--discovery", m.cfg.DiscoveryURL)
	} else {
		flags = append(flags, "--initial-cluster", m.InitialPeerURLsMap.String())
	}
	if m.cfg.AuthTokenTTL != 0 {
		flags = append(flags, "--auth-token-ttl", fmt.Sprint(m.cfg.AuthTokenTTL))
	}
	notify := m.cfg.WatchProgressNotifyInterval
	if notify == 0 {
		notify = v3rpc.GetProgressReportInterval().Truncate(time.Millisecond)
	}
	for name, duration := range map[string]time.Duration{
		"grpc-keepalive-min-time":                     m.cfg.GRPCKeepAliveMinTime,
		"grpc-keepalive-interval":                     m.cfg.GRPCKeepAliveInterval,
		"grpc-keepalive-timeout":                      m.cfg.GRPCKeepAliveTimeout,
		"experimental-watch-progress-notify-interval": notify,
		"experimental-corrupt-check-time":             m.cfg.CorruptCheckTime,
	} {
		if duration != 0 {
			flags = append(flags, "--"+name, duration.String())
		}
	}
	return append(flags, append(tlsFlags("", m.ClientTLSInfo), tlsFlags("peer-", m.PeerTLSInfo)...)...)
}

func tlsFlags(prefix string, info *transport.TLSInfo) (flags []string) {
	if info == nil {
		return nil
	}
	for name, file := range map[string]string{
		"cert-file": info.CertFile, "key-file": info.KeyFile, "trusted-ca-file": info.TrustedCAFile,
		"client-cert-file": info.ClientCertFile, "client-key-file": info.ClientKeyFile,
	} {
		if file != "" {
			flags = append(flags, "--"+prefix+name, file)
		}
	}
	if info.ClientCertAuth {
		flags = append(flags, "--"+prefix+"client-cert-auth")
	}
	if prefix == "" && info.CipherSuites != nil {
		var names []string
		for _, suite := range info.CipherSuites {
			names = append(names, tls.CipherSuiteName(suite))
		}
		flags = append(flags, "--cipher-suites", strings.Join(names, ","))
	}
	if prefix == "" && info.MaxVersion == tls.VersionTLS12 {
		flags = append(flags, "--tls-max-version", "TLS1.2")
	}
	return flags
}

// Launch starts the process and waits until it answers or ends.
func (m *member) Launch() (err error) {
	s := &process{m: m, stopc: make(chan struct{})}
	s.cmd = exec.Command(os.Getenv("STORE"), m.flags()...)
	s.cmd.Stderr = io.MultiWriter(os.Stderr, &s.log)
	s.cmd.Stdout = os.Stderr
	m.s = s
	if err := s.cmd.Start(); err != nil {
		close(s.stopc)
		return err
	}
	go func() {
		s.cmd.Wait()
		close(s.stopc)
	}()
	if listener, err := net.Listen("tcp", m.PeerURLs[0].Host); err == nil {
		through := &gate{Listener: listener, m: m, address: m.peerListen}
		m.peerBridge, _ = newBridge(through, through)
	} // A clone has no bridge: the address is in use.
	if m.useBridge {
		listener, err := transport.NewUnixListener(m.bridgeAddress())
		if err != nil {
			return err
		}
		through := &gate{Listener: listener, m: m, address: m.ClientURLs[0].Host}
		m.grpcBridge, _ = newBridge(through, through)
	}
	return s.waitReady()
}

// Close stops the process and the bridges.
func (m *member) Close() {
	for _, b := range []*bridge{m.grpcBridge, m.peerBridge} {
		if b != nil {
			b.Close()
		}
	}
	m.grpcBridge, m.peerBridge = nil, nil
	if m.serverClient != nil {
		m.serverClient.Close()
		m.serverClient = nil
	}
	if m.s == nil || m.s.cmd.Process == nil {
		return
	}
	m.s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-m.s.stopc:
	case <-time.After(stopTimeout):
		panic("the member does not stop")
	}
}

func (m *member) Stop(t testutil.TB) { m.Close() }

func (m *member) Restart(t testutil.TB) error { return m.Launch() }

func (m *member) Terminate(t testutil.TB) {
	m.Close()
	if !m.keepDataDirTerminate {
		os.RemoveAll(m.DataDir)
	}
}

func (m *member) StopNotify() <-chan struct{} { return m.s.StopNotify() }

func (m *member) ReadyNotify() <-chan struct{} { return m.s.ReadyNotify() }

func (m *member) WaitStarted(t testutil.TB) {
	for m.s.status() == nil {
		time.Sleep(tickDuration)
	}
}

func (m *member) WaitOK(t testutil.TB) {
	for m.s.Lead() == 0 {
		time.Sleep(tickDuration)
	}
}

func WaitClientV3(t testutil.TB, kv clientv3.KV) {
	ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
	defer cancel()
	for {
		_, err := kv.Get(ctx, "/")
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("timed out waiting for client: %v", err)
		}
		time.Sleep(tickDuration)
	}
}

// Metric returns the value of the first metric with this name and these labels.
func (m *member) Metric(name string, labels ...string) (string, error) {
	resp, err := http.Get(m.URL() + "/metrics")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
next:
	for lines.Scan() {
		line := lines.Text()
		if !strings.HasPrefix(line, name) {
			continue
		}
		for _, label := range labels {
			if !strings.Contains(line, label) {
				continue next
			}
		}
		return strings.Split(line, " ")[1], nil
	}
	return "", lines.Err()
}

// Pause cuts the member off from the other members; clients still reach it.
func (m *member) Pause() { m.InjectPartition(nil, m.cluster.Members...) }

func (m *member) Resume() { m.RecoverPartition(nil, m.cluster.Members...) }

func (m *member) InjectPartition(t testutil.TB, others ...*member) {
	for _, other := range others {
		m.setCut(other, true)
		other.setCut(m, true)
	}
	for _, other := range others {
		m.dropCut()
		other.dropCut()
	}
}

func (m *member) RecoverPartition(t testutil.TB, others ...*member) {
	for _, other := range others {
		m.setCut(other, false)
		other.setCut(m, false)
	}
}

func (m *member) setCut(other *member, cut bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if cut && other != m {
		m.cut[other] = true
	} else {
		delete(m.cut, other)
	}
}

// dropCut closes the connections from members that are cut off.
func (m *member) dropCut() {
	if m.peerBridge == nil {
		return
	}
	m.peerBridge.mu.Lock()
	defer m.peerBridge.mu.Unlock()
	for conn := range m.peerBridge.conns {
		if m.isCut(conn.in) {
			conn.close()
		}
	}
}

// isCut tells whether a connection comes from a member that is cut off, or perhaps does: the kernel's
// table may lack a socket while others come and go.
func (m *member) isCut(conn net.Conn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	address, ok := conn.RemoteAddr().(*net.TCPAddr)
	if len(m.cut) == 0 || !ok { // Clients come by a unix socket.
		return false
	}
	socket := socketOf(address.Port)
	for _, other := range m.cluster.Members {
		if !m.cut[other] && other.s.has(socket) {
			return false
		}
	}
	return true
}

// socketOf returns the name of the socket at this local port in the folders of open files.
func socketOf(port int) string {
	table, _ := os.ReadFile("/proc/net/tcp")
	for _, line := range strings.Split(string(table), "\n")[1:] {
		fields := strings.Fields(line)
		if len(fields) > 9 {
			_, local, _ := strings.Cut(fields[1], ":")
			if number, _ := strconv.ParseInt(local, 16, 32); int(number) == port {
				return "socket:[" + fields[9] + "]"
			}
		}
	}
	return "none"
}

// gate is both ends of a bridge. It closes a connection that does not get through, at once.
type gate struct {
	net.Listener
	m       *member
	address string
	behind  net.Conn // Of the latest connection.
}

func (g *gate) Accept() (net.Conn, error) {
	for {
		conn, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if !g.m.isCut(conn) {
			if g.behind, err = net.Dial("tcp", g.address); err == nil {
				return conn, nil
			}
		}
		conn.Close()
	}
}

func (g *gate) Dial() (net.Conn, error) { return g.behind, nil }

// process is what etcd's tests take for the server itself.
type process struct {
	m     *member
	cmd   *exec.Cmd
	log   bytes.Buffer
	id    uint64
	stopc chan struct{} // Closed when it has ended.
}

func (s *process) waitReady() error {
	deadline := time.Now().Add(startTimeout)
	for time.Now().Before(deadline) {
		if s.isStopped() {
			return fmt.Errorf("the member ended: %s\n%s", s.cmd.ProcessState, s.log.String())
		}
		if conn, err := net.Dial("tcp", s.m.ClientURLs[0].Host); err == nil {
			conn.Close()
			client, err := s.m.connect(s.m.directURL(), nil)
			if err != nil {
				continue
			}
			s.m.serverClient = client
			for time.Now().Before(deadline) && !s.isStopped() {
				if status := s.status(); status != nil {
					s.id = status.Header.MemberId
					return nil
				}
			}
		}
		time.Sleep(tickDuration / 5)
	}
	return fmt.Errorf("the member does not answer")
}

func (s *process) isStopped() bool {
	select {
	case <-s.stopc:
		return true
	default:
		return false
	}
}

// has tells whether the process has this socket open.
func (s *process) has(socket string) bool {
	folder := fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid)
	files, _ := os.ReadDir(folder)
	for _, file := range files {
		if name, _ := os.Readlink(filepath.Join(folder, file.Name())); name == socket {
			return true
		}
	}
	return false
}

// status returns nil unless the process answers within 2 s.
func (s *process) status() *pb.StatusResponse {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if s.m.serverClient == nil {
		return nil
	}
	status, err := s.maintenance().Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return nil
	}
	return status
}

func (s *process) maintenance() pb.MaintenanceClient {
	return pb.NewMaintenanceClient(s.m.serverClient.ActiveConnection())
}

// members returns what the process itself knows, without asking a leader.
func (s *process) members() ([]*pb.Member, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	cluster := pb.NewClusterClient(s.m.serverClient.ActiveConnection())
	listed, err := cluster.MemberList(ctx, &pb.MemberListRequest{})
	if err != nil {
		return nil, err
	}
	return listed.Members, nil
}

func (s *process) ID() types.ID { return types.ID(s.id) }

func (s *process) Lead() uint64 {
	if status := s.status(); status != nil {
		return status.Leader
	}
	return 0
}

func (s *process) AppliedIndex() uint64 {
	if status := s.status(); status != nil {
		return status.RaftAppliedIndex
	}
	return 0
}

func (s *process) StopNotify() <-chan struct{} { return s.stopc }

// ReadyNotify returns a closed channel: Launch has waited.
func (s *process) ReadyNotify() <-chan struct{} {
	ready := make(chan struct{})
	close(ready)
	return ready
}

// FirstCommitInTermNotify returns nil: it is of no use outside the server's process.
func (s *process) FirstCommitInTermNotify() <-chan struct{} { return nil }

func (s *process) Alarm(ctx context.Context, req *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	return s.maintenance().Alarm(ctx, req)
}

// TransferLeadership moves the leadership to another voter, if there is one.
func (s *process) TransferLeadership() error {
	members, err := s.members()
	for _, other := range members {
		if other.ID != s.id && !other.IsLearner {
			ctx, cancel := context.WithTimeout(context.Background(), RequestWaitTimeout)
			defer cancel()
			_, err = s.m.serverClient.MoveLeader(ctx, other.ID)
			break
		}
	}
	return err
}
