{{/* The name of all that is made; KubeRay appends to it, and wants 50 characters in all. */}}
{{- define "lazyfarm.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 38 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 38 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "lazyfarm.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* A key of the Secret as a file in the containers; "" for none. */}}
{{- define "lazyfarm.file" -}}
{{- with . }}/etc/lazyfarm/secret/{{ . }}{{ end -}}
{{- end -}}

{{/* One value as TOML. Helm's numbers are floats: whole ones are told without an exponent. */}}
{{- define "lazyfarm.toml.value" -}}
{{- if kindIs "float64" . -}}
{{- if eq . (floor .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- else -}}
{{- toJson . -}}
{{- end -}}
{{- end -}}

{{/* The farm's configuration, by section. */}}
{{- define "lazyfarm.config" -}}
{{- $redis := dict "url" .Values.redis.url "username" .Values.redis.username "wait_replicas" .Values.redis.waitReplicas
    "password_file" (include "lazyfarm.file" .Values.redis.passwordKey) "ca_file" (include "lazyfarm.file" .Values.redis.caKey)
    "client_cert_file" (include "lazyfarm.file" .Values.redis.clientCertKey)
    "client_key_file" (include "lazyfarm.file" .Values.redis.clientKeyKey) -}}
{{- $s3 := dict "endpoint" .Values.s3.endpoint "region" .Values.s3.region "bucket" .Values.s3.bucket
    "credentials_file" (include "lazyfarm.file" .Values.s3.credentialsKey)
    "ca_file" (include "lazyfarm.file" .Values.s3.caKey) -}}
{{- $ray := dict "address" "127.0.0.1:6379" "token_file" (include "lazyfarm.file" .Values.ray.tokenKey) -}}
{{- $node := dict "root" "/var/lib/lazyfarm/nodes" "cache_bytes" .Values.node.cacheBytes
    "snapshotter" (ternary "overlay" "copying" .Values.node.privileged) -}}
{{- $web := dict "enabled" .Values.page.enabled "port" .Values.page.port
    "host" (ternary "0.0.0.0" "127.0.0.1" .Values.page.service.enabled) -}}
{{- $open := dict "enabled" true "port" .Values.gateway.port "host" "0.0.0.0"
    "cert_file" "/etc/lazyfarm/gateway/tls.crt" "key_file" "/etc/lazyfarm/gateway/tls.key" -}}
{{- $gateway := ternary $open (dict "enabled" false) .Values.gateway.enabled -}}
{{- $told := dict "farm" (dict "name" .Values.farm.name) "redis" $redis "s3" $s3 "ray" $ray "node" $node "web" $web
    "gateway" $gateway -}}
{{- $all := mergeOverwrite $told (deepCopy .Values.config) -}}
{{- range $section := keys $all | sortAlpha }}
{{- $keys := get $all $section }}
{{- if eq $section "registries" }}
{{- range $host := keys $keys | sortAlpha }}
[registries.{{ toJson $host }}]
{{- $registry := get $keys $host }}
{{- range $key := keys $registry | sortAlpha }}
{{ $key }} = {{ include "lazyfarm.toml.value" (get $registry $key) }}
{{- end }}
{{ end }}
{{- else }}
[{{ $section }}]
{{- range $key := keys $keys | sortAlpha }}
{{ $key }} = {{ include "lazyfarm.toml.value" (get $keys $key) }}
{{- end }}
{{ end }}
{{- end }}
{{- end -}}

{{/* A Pod of the cluster. Takes the root, what is the role's own (`of`), and the role: head or node. */}}
{{- define "lazyfarm.pod" -}}
{{- $root := .root -}}
{{- $drain := 0 -}}
{{- if and (eq .role "node") (not $root.Values.node.volume) }}{{ $drain = .of.drainSeconds }}{{ end -}}
metadata:
  labels:
    {{- include "lazyfarm.labels" $root | nindent 4 }}
  {{- if or $root.Values.metrics.scrape .of.annotations }}
  annotations:
    {{- if $root.Values.metrics.scrape }}
    prometheus.io/scrape: "true"
    prometheus.io/port: {{ $root.Values.metrics.port | quote }}
    prometheus.io/path: /metrics
    {{- end }}
    {{- with .of.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
spec:
  serviceAccountName: {{ include "lazyfarm.name" $root }}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ add $root.Values.terminationGracePeriodSeconds $drain }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .of.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .of.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  # Two on one machine would share its disk, and with a hostPath one directory and one name.
  affinity:
    podAntiAffinity:
      requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              ray.io/cluster: {{ include "lazyfarm.name" $root }}
  containers:
    - name: ray-{{ .role }}
      image: "{{ $root.Values.image.repository }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}"
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [lazyfarm-node]
      args: [{{ .role }}]
      env:
        - name: LAZYFARM_CONFIG
          value: /etc/lazyfarm/config/farm.toml
        {{- if not $root.Values.node.volume }}
        # The disk stays with the machine, and so does the name that it is found by.
        - name: LAZYFARM_NODE
          valueFrom:
            fieldRef:
              fieldPath: spec.nodeName
        {{- end }}
        {{- if $drain }}
        - name: LAZYFARM_DRAIN_S
          value: {{ $drain | quote }}
        {{- end }}
        - name: RAY_AUTH_MODE
          value: token
        - name: RAY_AUTH_TOKEN_PATH
          value: {{ include "lazyfarm.file" $root.Values.ray.tokenKey }}
        {{- with .of.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - name: metrics
          containerPort: {{ $root.Values.metrics.port }}
        {{- if eq .role "head" }}
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        {{- if $root.Values.page.enabled }}
        - name: page
          containerPort: {{ $root.Values.page.port }}
        {{- end }}
        {{- if $root.Values.gateway.enabled }}
        - name: gateway
          containerPort: {{ $root.Values.gateway.port }}
        {{- end }}
        {{- end }}
      resources:
        {{- toYaml .of.resources | nindent 8 }}
      securityContext:
        runAsUser: 0
        {{- if $root.Values.node.privileged }}
        privileged: true
        {{- else }}
        allowPrivilegeEscalation: false
        {{- end }}
      volumeMounts:
        - name: disk
          mountPath: /var/lib/lazyfarm
        - name: config
          mountPath: /etc/lazyfarm/config
          readOnly: true
        - name: secret
          mountPath: /etc/lazyfarm/secret
          readOnly: true
        {{- if and $root.Values.gateway.enabled (eq .role "head") }}
        - name: gateway
          mountPath: /etc/lazyfarm/gateway
          readOnly: true
        {{- end }}
  volumes:
    - name: disk
      {{- if $root.Values.node.volume }}
      {{- toYaml $root.Values.node.volume | nindent 6 }}
      {{- else }}
      hostPath:
        path: {{ $root.Values.node.hostPath }}
        type: DirectoryOrCreate
      {{- end }}
    - name: config
      configMap:
        name: {{ include "lazyfarm.name" $root }}
    - name: secret
      secret:
        secretName: {{ $root.Values.secret.name }}
        defaultMode: 0400
    {{- if and $root.Values.gateway.enabled (eq .role "head") }}
    - name: gateway
      secret:
        secretName: {{ required "gateway.tlsSecret is missing: tokens must not cross a network in the clear" $root.Values.gateway.tlsSecret }}
        defaultMode: 0400
    {{- end }}
{{- end -}}
